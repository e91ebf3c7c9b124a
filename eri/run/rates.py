"""How fast earlier runs like this one were on this machine; the plan's time comes from it.

One small file in the cache, which may be lost or damaged without harm: times are then unknown.
"""

import json
import math
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from eri.errors import DiskError
from eri.files import atomic_write, cache_dir

__all__ = ["Rate", "device_name", "known_rate", "remember_rate"]

MOST_KEPT = 200
MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class Rate:
    """The speed of a run: its median over the steps, previews and saves left out."""

    images_per_second: float
    measured: date


def known_rate(run: str) -> Rate | None:
    """What was measured of runs like this one here.

    Args:
        run: all that the speed depends on, in words.
    """
    try:
        images_per_second, measured = _read(_file())[run]
        rate = Rate(float(images_per_second), date.fromisoformat(measured))
    except (KeyError, TypeError, ValueError, DiskError):
        return None
    return rate if math.isfinite(rate.images_per_second) and rate.images_per_second > 0 else None


def remember_rate(run: str, images_per_second: float | None) -> None:
    """Keep what a run measured, for the plans of later ones; a cache that fails is no harm.

    Args:
        run: as for `known_rate`.
        images_per_second: the run's median; None where it was too short to tell.
    """
    if images_per_second is None:
        return
    with suppress(DiskError):
        path = _file()
        rates = _read(path)
        rates.pop(run, None)  # the latest stand last
        rates[run] = (images_per_second, date.today().isoformat())
        kept = dict(list(rates.items())[-MOST_KEPT:])
        with atomic_write(path) as file:
            file.write(json.dumps(kept, indent=0).encode())


def device_name(device: torch.device) -> str:
    """What a speed was measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _file() -> Path:
    return cache_dir() / "rates.json"


def _read(path: Path) -> dict:
    try:
        if path.stat().st_size > MAX_BYTES:
            return {}
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}

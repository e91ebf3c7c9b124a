"""How fast earlier runs like this one were on this machine; the plan's time comes from it."""

import math
import os
import platform
from dataclasses import dataclass
from datetime import date

import torch

from eri.run.remembered import recall, remember

__all__ = ["Rate", "device_name", "known_rate", "remember_rate"]

RATES = "rates"  # what they are remembered as


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
        images_per_second, measured = recall(RATES, run)
        rate = Rate(float(images_per_second), date.fromisoformat(measured))
    except (TypeError, ValueError):
        return None
    return rate if math.isfinite(rate.images_per_second) and rate.images_per_second > 0 else None


def remember_rate(run: str, images_per_second: float | None) -> None:
    """Keep what a run measured, for the plans of later ones.

    Args:
        run: as for `known_rate`.
        images_per_second: the run's median; None where it was too short to tell.
    """
    if images_per_second is not None:
        remember(RATES, run, (images_per_second, date.today().isoformat()))


def device_name(device: torch.device) -> str:
    """What a speed was measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"

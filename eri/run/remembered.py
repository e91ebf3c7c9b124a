"""Small facts that are kept between runs: JSON files in the cache, one for each kind of fact.

They may be lost or damaged without harm: what they say is then not known, and found out again.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from eri.errors import DiskError
from eri.files import atomic_write, cache_dir

__all__ = ["MOST_KEPT", "recall", "remember"]

MOST_KEPT = 200
MAX_BYTES = 1_000_000


def recall(kind: str, key: str) -> Any:
    """What was remembered, as JSON gives it back; None if nothing is known."""
    try:
        return _read(_file(kind)).get(key)
    except DiskError:
        return None


def remember(kind: str, key: str, value: object) -> None:
    """Keep a fact for later runs; of very many only the latest are kept."""
    with suppress(DiskError):
        path = _file(kind)
        facts = dict(_read(path))
        facts.pop(key, None)  # the latest stand last
        facts[key] = value
        kept = dict(list(facts.items())[-MOST_KEPT:])
        with atomic_write(path) as file:
            file.write(json.dumps(kept, indent=0).encode())


def _file(kind: str) -> Path:
    return cache_dir() / f"{kind}.json"


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            return {}
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}

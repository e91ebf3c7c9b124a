"""Pieces of fuzzing for processes of their own: a decoder that crashes takes its own along."""

import tempfile
from pathlib import Path

from tests.torture import fuzz

__all__ = ["CHUNK", "fuzz_chunk"]

CHUNK = {"fuzz_headers": 20_000, "fuzz_yaml": 5_000, "fuzz_images": 5_000}
"""Cases at a time, by the fuzzer's name."""


def fuzz_chunk(name: str, count: int, seed: int, start: int) -> tuple[int, list[str]]:
    """In a process of its own: how many cases, and those that were not as promised."""
    with tempfile.TemporaryDirectory() as folder:
        if name == "fuzz_headers":
            result = fuzz.fuzz_headers(count, seed, start=start, memory=False)
        else:
            result = getattr(fuzz, name)(count, seed, Path(folder), start=start)
    return result.cases, [f"{name} {seed}/{o.number}: {o.what}" for o in result.outside]

"""Broken input by the thousand: what comes out is a result or one of our own errors, in time.

Case number n is made from (seed, n) alone, so a failure is made again by its number. What lies
outside the contract is counted and kept, not raised. A test runs thousands of cases,
scripts/torture millions.

    fuzz_headers(count, seed)           safetensors headers, in memory
    fuzz_inspect(count, seed, folder)   the same as files, through `eri inspect`
    fuzz_yaml(count, seed, folder)      config files
    fuzz_images(count, seed, folder)    image files of every format that is read
"""

import gc
import os
import random
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import safetensors

from eri.config import load_config
from eri.data.images import decode, pillow_warnings_ignored
from eri.errors import ConfigError, DataError, EriError, ModelError
from eri.formats import header
from eri.run.inspect import inspect_path
from tests.torture.mutations import mutated_header, mutated_image, mutated_yaml

__all__ = ["Fuzzed", "Outside", "fuzz_headers", "fuzz_images", "fuzz_inspect", "fuzz_yaml"]

SHOWN = 20  # cases outside the contract that are kept whole
TIDY = 1000  # cases between two looks of the garbage collector, which is off while one is timed
PIXEL_CAP = 1_000_000
HEADER_SECONDS, HEADER_BYTES = 0.05, 64 * 2**20
INSPECT_SECONDS = 1.0  # the first builds the shapes of the nets
YAML_SECONDS = 0.1
IMAGE_SECONDS = 1.0


@dataclass(frozen=True)
class Outside:
    """A case that broke the contract: its number, how, and the input itself."""

    number: int
    what: str
    content: bytes


@dataclass
class Fuzzed:
    """What became of some cases.

    Attributes:
        cases: how many there were.
        accepted: how many gave a result.
        refused: how many gave the one error that they may give.
        slowest: seconds of the processor that the slowest took.
        slowest_case: its number.
        most_bytes: the most memory that one took, where it was measured.
        broken: how many lie outside the contract.
        outside: the first of these.
    """

    cases: int = 0
    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    slowest_case: int = -1
    most_bytes: int = 0
    broken: int = 0
    outside: list[Outside] = field(default_factory=list)

    def report(self) -> str:
        """One line, and one for each case outside the contract that was kept."""
        lines = [
            f"{self.cases} cases: {self.accepted} accepted, {self.refused} refused, "
            f"{self.broken} outside the contract; slowest {1000 * self.slowest:.1f} ms "
            f"(case {self.slowest_case}), most memory {self.most_bytes / 2**20:.1f} MiB"
        ]
        lines += [f"  case {c.number}: {c.what}: {c.content[:200]!r}" for c in self.outside]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Contract:
    """How a case is made and run, and what may come of it.

    Attributes:
        make: a case.
        run: tries it; says what is wrong with a result.
        allowed: the error that refuses it.
        seconds: of the processor that it may take.
        most_bytes: that it may take; None does not measure, which halves the time.
        where: what an error must name.
        heard: what it said where it should be silent.
    """

    make: Callable[[random.Random], bytes]
    run: Callable[[bytes], str | None]
    allowed: type[EriError]
    seconds: float
    most_bytes: int | None = None
    where: str = ""
    heard: Callable[[], str | None] = lambda: None


def fuzz_headers(count: int, seed: int = 0, *, start: int = 0, memory: bool = True) -> Fuzzed:
    """Mutated safetensors headers: read, or ModelError; at most 50 ms and 64 MiB each.

    What is read, the reference library reads too, and finds the same tensors in it.

    Args:
        count: cases.
        seed: of all of them.
        start: number of the first.
        memory: whether memory is measured, at half the speed.
    """

    def run(content: bytes) -> str | None:
        found = header._read(BytesIO(content), len(content), Path("model.safetensors"))
        ours = {name: list(info.shape) for name, info in found.tensors.items()}
        theirs = {name: info["shape"] for name, info in safetensors.deserialize(content)}
        return None if ours == theirs else "the library reads other tensors"

    most = HEADER_BYTES if memory else None
    contract = _Contract(mutated_header, run, ModelError, HEADER_SECONDS, most, "model.safetensors")
    return _fuzz(contract, count, seed, start)


def fuzz_inspect(count: int, seed: int, folder: Path, *, start: int = 0) -> Fuzzed:
    """The cases of `fuzz_headers` as files, through `eri inspect`: nothing but exit 0 or 4."""
    path = folder / "model.safetensors"

    def run(content: bytes) -> None:
        path.write_bytes(content)
        inspect_path(path)

    contract = _Contract(mutated_header, run, ModelError, INSPECT_SECONDS, where=str(path))
    return _fuzz(contract, count, seed, start)


def fuzz_yaml(count: int, seed: int, folder: Path, *, start: int = 0) -> Fuzzed:
    """Mutated configs: settings, or ConfigError; at most 100 ms each."""
    path = folder / "config.yaml"

    def run(content: bytes) -> None:
        path.write_bytes(content)
        load_config(path)

    contract = _Contract(mutated_yaml, run, ConfigError, YAML_SECONDS, where=str(path))
    return _fuzz(contract, count, seed, start)


def fuzz_images(count: int, seed: int, folder: Path, *, start: int = 0) -> Fuzzed:
    """Mutated images: RGB pixels, or DataError that names the file; at most 1 s, not a word said.

    The case lies in `folder` while it is decoded, and is still there if a decoder ends the process.
    """
    path = folder / "image.bin"

    def run(content: bytes) -> str | None:
        path.write_bytes(content)
        image = decode(path, pixel_cap=PIXEL_CAP).image
        fits = image.mode == "RGB" and image.width * image.height <= PIXEL_CAP
        return None if fits else f"came out as {image.mode}, {image.size}"

    with _stderr_heard() as heard, pillow_warnings_ignored():
        contract = _Contract(
            mutated_image, run, DataError, IMAGE_SECONDS, where=str(path), heard=heard
        )
        return _fuzz(contract, count, seed, start)


def _fuzz(contract: _Contract, count: int, seed: int, start: int) -> Fuzzed:
    result = Fuzzed()
    with _garbage_kept() as tidy, _memory_traced(contract.most_bytes is not None):
        for number in range(start, start + count):
            content = contract.make(random.Random(f"{seed} {number}"))
            what = _judged(contract, content, number, result)
            if what is not None:
                result.broken += 1
                result.outside += [Outside(number, what, content)][: SHOWN - len(result.outside)]
            if number % TIDY == 0:
                tidy()
    return result


def _judged(contract: _Contract, content: bytes, number: int, result: Fuzzed) -> str | None:
    """Runs a case; what of it is outside the contract."""
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    begun = time.thread_time()
    try:
        what = contract.run(content)
        result.accepted += 1
    except contract.allowed as error:
        what = _wrong_message(error, contract.where)
        result.refused += 1
    except Exception as error:  # noqa: BLE001 - the very thing that is looked for
        what = f"{type(error).__name__}: {error}"
    took = time.thread_time() - begun
    _, peak = tracemalloc.get_traced_memory()
    result.cases += 1
    if took > result.slowest:
        result.slowest, result.slowest_case = took, number
    result.most_bytes = max(result.most_bytes, peak - before)
    if took > contract.seconds:
        what = what or f"took {1000 * took:.0f} ms"
    if contract.most_bytes is not None and peak - before > contract.most_bytes:
        what = what or f"took {peak - before:,} bytes"
    return what or contract.heard()


def _wrong_message(error: EriError, where: str) -> str | None:
    """What is wrong with an error's words: they are printable lines that name the file."""
    lines = [str(error), error.hint or "", *error.problems]
    if not all(line.isprintable() for line in lines):
        return f"an error with hidden characters: {lines}"
    if where not in str(error):
        return f"an error that does not name the file: {error}"
    return None


@contextmanager
def _garbage_kept() -> Iterator[Callable[[], object]]:
    """No collection of garbage while a case is timed; gives the function that collects it."""
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


@contextmanager
def _memory_traced(wanted: bool) -> Iterator[None]:
    if wanted:
        tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


@contextmanager
def _stderr_heard() -> Iterator[Callable[[], str | None]]:
    """Descriptor 2, where C libraries complain, as a file; gives what is new since last time."""
    heard = 0

    def new() -> str | None:
        nonlocal heard
        before, heard = heard, os.fstat(kept.fileno()).st_size
        text = os.pread(kept.fileno(), 200, before)
        return f"wrote to stderr: {text!r}" if text else None

    screen = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield new
        finally:
            os.dup2(screen, 2)
            os.close(screen)

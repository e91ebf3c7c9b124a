"""eri's own kernels: how much of the card's bandwidth they reach, and what PyTorch takes.

The bandwidth is that of a copy of 1 GiB, read and written. A kernel's bytes are those of its
operands, each as often as the algorithm needs it, at the sizes of a step of SDXL and of SD 1.5 in
bfloat16 (`scripts/benchmark/kernel_cases.py` has all of them). Beside it stands what PyTorch's own
operations take for the same.

Nothing comes out of the L2 cache by chance: launches take turns on as many sets of random operands,
results included, as are four times the cache together. A row with a * has operands so small that
the most sets there may be are less than twice the cache. A number is the median of seven replays of
a CUDA graph that holds every set at least once, so Python has no part in it; neither have warm-up
runs.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from eri.errors import EriError
from eri.layers.backend import current_backend, set_backend
from scripts.benchmark.kernel_cases import KERNELS, cases
from scripts.benchmark.kernel_shapes import NETS, TINY_NETS
from scripts.benchmark.kernel_work import Case, Draw, Work
from scripts.benchmark.machine import facts, synchronize

COPY_BYTES = 2**30
CACHES = 4  # that all sets of operands are together
MOST_SETS = 512
LAUNCHES = 16  # in a graph, at least
WINDOWS = 7


@dataclass(frozen=True)
class Row:
    """How long something takes that moves so many bytes.

    Attributes:
        kernel: its name.
        net: family and batch that ask for it.
        shape: of its operands.
        bytes: that have to be moved.
        microseconds: of a launch; None where it failed.
        pytorch: microseconds of PyTorch's own operations.
        sets: of operands that took turns.
        cached: whether some of them may come from the cache all the same.
        failed: why there is no number.
    """

    kernel: str
    net: str
    shape: str
    bytes: int = 0
    microseconds: float | None = None
    pytorch: float | None = None
    sets: int = 0
    cached: bool = False
    failed: str | None = None

    @property
    def gb_per_second(self) -> float | None:
        """Bandwidth."""
        return None if self.microseconds is None else self.bytes / self.microseconds / 1e3


def run(options: argparse.Namespace) -> int:
    """Time them and print a table."""
    device = torch.device(options.device)
    found = facts(device)
    for name, fact in found.items():
        print(f"{name}: {fact}")
    with _kernels_alone(device), torch.no_grad():
        copied = copy_bandwidth(device, COPY_BYTES // 4096 if options.tiny else COPY_BYTES)
        print(f"a copy moves {copied:.1f} GB/s, read and written\n\n{_head()}")
        rows = []
        for case in chosen(options):
            rows.append(measure(case, device))
            print(_line(rows[-1], copied), flush=True)
    if options.json:
        content = {
            "facts": found,
            "copy_gb_per_second": copied,
            "rows": [asdict(row) | {"gb_per_second": row.gb_per_second} for row in rows],
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(any(row.failed for row in rows))


def chosen(options: argparse.Namespace) -> Iterator[Case]:
    """The cases that are asked for."""
    nets = TINY_NETS if options.tiny else {name: NETS[name] for name in options.family}
    return (case for case in cases(nets) if not options.only or case.kernel in options.only)


@contextmanager
def _kernels_alone(device: torch.device) -> Iterator[None]:
    """On a card a kernel that cannot be used is an error: it is not the reference that is timed."""
    before = current_backend()
    set_backend("cuda" if device.type == "cuda" else "auto")
    try:
        yield
    finally:
        set_backend(before)


def copy_bandwidth(device: torch.device, size: int) -> float:
    """GB/s of a copy of so many bytes in device memory: the driver's, or a kernel's where that is
    faster.
    """
    source, target = torch.empty(2, size // 4, device=device).normal_().unbind()
    copies = lambda: target.copy_(source), lambda: torch.neg(source, out=target)
    return 2 * size / min(microseconds([copy], device) for copy in copies) / 1e3


def measure(case: Case, device: torch.device) -> Row:
    """Time a case; what goes wrong is told in its row, and the others follow."""
    torch.manual_seed(0)
    name = (case.kernel, case.net, case.shape)
    try:
        sets = _sets(case, Draw(device))
        size, together = sets[0].bytes, len(sets) * sets[0].bytes
        ours = microseconds([one.ours for one in sets], device)
        theirs = microseconds([one.theirs for one in sets], device)
    except (RuntimeError, EriError) as error:  # out of memory, or not for the kernel
        return Row(*name, failed=f"{type(error).__name__}: {str(error).splitlines()[0]}")
    cached = together < 2 * cache_bytes(device)
    return Row(*name, size, ours, theirs, len(sets), cached)


def _sets(case: Case, draw: Draw) -> list[Work]:
    first = case.make(draw)
    wanted = max(2, -(-CACHES * cache_bytes(draw.device) // first.bytes))
    return [first, *(case.make(draw) for _ in range(min(wanted, MOST_SETS) - 1))]


def cache_bytes(device: torch.device) -> int:
    """Of the L2 cache of a card; 0 where there is none to defeat."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).L2_cache_size


def microseconds(works: Sequence[Callable[[], object]], device: torch.device) -> float:
    """The median time of one of them, which take turns."""
    results: list[object] = [work() for work in works]  # warm-up; kept, so that places differ
    rounds = -(-LAUNCHES // len(works)) if device.type == "cuda" else 1

    def every() -> None:
        for i, work in [*enumerate(works)] * rounds:
            results[i] = work()

    window = _replays(every, device) if device.type == "cuda" else _calls(every)
    window()
    return statistics.median(window() for _ in range(WINDOWS)) / (rounds * len(works))


def _replays(every: Callable[[], None], device: torch.device) -> Callable[[], float]:
    """Microseconds of a replay of it all."""
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        every()

    def window() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1000 * start.elapsed_time(end)

    return window


def _calls(every: Callable[[], None]) -> Callable[[], float]:
    def window() -> float:
        start = time.perf_counter()
        every()
        return 1e6 * (time.perf_counter() - start)

    return window


def _head() -> str:
    titles = f"{'us':>10}{'GB/s':>9}{'of a copy':>11}{'PyTorch us':>12}{'faster':>8}"
    return f"{'kernel':<27}{'for':<9}{'shape':<32}{titles}"


def _line(row: Row, copied: float) -> str:
    begin = f"{row.kernel:<27}{row.net:<9}{row.shape:<32}"
    if row.microseconds is None or row.pytorch is None or row.gb_per_second is None:
        return f"{begin}  failed: {row.failed}"
    mark = "*" if row.cached else ""
    return (
        f"{begin}{row.microseconds:>10.1f}{row.gb_per_second:>9.1f}"
        f"{row.gb_per_second / copied:>11.1%}{row.pytorch:>12.1f}"
        f"{row.pytorch / row.microseconds:>7.2f}×{mark}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kernels`."""
    parser.add_argument("--family", nargs="+", choices=tuple(NETS), default=tuple(NETS))
    parser.add_argument(
        "--only", nargs="+", choices=KERNELS, metavar="NAME", help=f"of {', '.join(KERNELS)}"
    )

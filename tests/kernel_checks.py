"""How exact a kernel is, and how fast: what the tests of all kernels measure alike."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch import Tensor

from eri.layers.backend import set_backend

WITHOUT_VALUES = ("test_schema", "test_autograd_registration", "test_faketensor")  # of opcheck


@contextmanager
def poison() -> Iterator[None]:
    """What is made inside holds NaN wherever nothing is written."""
    mode = torch.utils.deterministic
    filled = mode.fill_uninitialized_memory  # type: ignore[attr-defined]
    mode.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        mode.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@contextmanager
def ops_on_cpu() -> Iterator[None]:
    """A CPU takes the ops, which are their references there, where a card takes its kernels."""
    with patch("eri.layers.backend.no_kernels", return_value=None):
        set_backend("cuda")
        try:
            yield
        finally:
            set_backend("auto")


@contextmanager
def where_ops_are(device: torch.device) -> Iterator[None]:
    """The device takes the ops and nothing else."""
    with ops_on_cpu() if device.type == "cpu" else nullcontext():
        set_backend("cuda")
        yield


def gradients(y: Tensor, dy: Tensor, *leaves: Tensor | None) -> list[Tensor]:
    """y, and the gradients of those leaves that have one."""
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def with_gaps(rows: Tensor, gap: int) -> Tensor:
    """The same rows `[..., D]`, each with a gap of NaN behind it."""
    wide = rows.new_full((*rows.shape[:-1], rows.shape[-1] + gap), torch.nan)
    return wide[..., : rows.shape[-1]].copy_(rows)


def error(found: Tensor, truth: Tensor) -> float:
    return torch.linalg.vector_norm(found.double() - truth).item()


def ulp(truth: Tensor, dtype: torch.dtype) -> float:
    """One unit in the last place of the norm."""
    return torch.linalg.vector_norm(truth).item() * torch.finfo(dtype).eps


def copy_bandwidth() -> float:
    """Bytes a second of a copy in device memory, read and written; the driver's or a kernel's."""
    source, target = torch.zeros(2, 2**28, device="cuda").unbind()
    copies = lambda _: target.copy_(source), lambda _: torch.neg(source, out=target)
    return 2 * 2**30 / min(map(microseconds, copies)) * 1e6


def microseconds(work: Callable[[int], object], sets: int = 4, windows: int = 7) -> float:
    """The time of a piece of work in a CUDA graph, on several sets of inputs in turn."""
    for i in range(sets):
        work(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(4 * sets):
            work(i % sets)
    times = []
    for _ in range(windows + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / (4 * sets))
    return sorted(times[1:])[windows // 2]

"""Work on a GPU recorded once and replayed, so that the host is not waited for.

A step of SDXL is some ten thousand kernels, which Python launches more slowly than a large GPU runs
them. A CUDA graph is launched in one go. It is fixed in everything: shapes, addresses, settings.
So there is one for each set of input shapes, inputs are copied to where it reads them, and whatever
changes from step to step has to be a tensor.

All graphs, and all that runs between them, share one piece of memory and one stream: how much is
taken is the most that one of them needs, not the sum.

Source: CUDA C++ Programming Guide, "CUDA Graphs"; PyTorch notes, "CUDA Graphs".
"""

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

__all__ = ["MOST", "Graphs", "Workspace"]

log = logging.getLogger(__name__)

MOST = 32  # graphs; each takes some ten MiB beside the memory that they share

Inputs = Mapping[str, Tensor]
Run = Callable[[Inputs], None]


class Workspace:
    """A stream, and the memory that all work on it takes.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.device = self.stream.device  # with its number
        self.pool = torch.cuda.MemPool()

    def renew(self) -> None:
        """Give all memory back that nothing is in; what comes next begins with none."""
        if self.pool.use_count() == 1:  # else a recording that failed holds it until the end
            self.pool = torch.cuda.MemPool()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Work within takes its memory from here; it may not keep any of it."""
        # a pool is joined by thread, and the backward pass would have one of its own
        with (
            self.on_stream(),
            torch.cuda.use_mem_pool(self.pool, self.device),
            torch.autograd.set_multithreading_enabled(False),
        ):
            yield

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Work within runs after what was asked before, and before what is asked later."""
        outside = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            outside.wait_stream(self.stream)


@dataclass
class _Graph:
    """A recording, and where it reads its inputs."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs


class Graphs:
    """Runs functions of tensors, as graphs where that pays.

    The first time that a function meets inputs of some shapes it just runs, which also makes
    libraries choose their kernels; the second time it is recorded. So shapes that come once cost
    nothing more.

    Args:
        workspace: of all the graphs.
        most: that are recorded; inputs of further shapes just run.
        say: gets a line when there are more of them, once.
    """

    def __init__(
        self,
        workspace: Workspace,
        most: int = MOST,
        say: Callable[[str], None] = log.warning,
    ) -> None:
        self.workspace = workspace
        self.most = most
        self.say = say
        self._is_full = False  # and that was said
        self.seconds = 0.0  # of the host, for what is met first and for recording
        self._met: set[object] = set()
        self._graphs: dict[object, _Graph] = {}

    def __call__(self, run: Run, inputs: Inputs) -> None:
        """Run a function.

        Args:
            run: changes tensors and returns nothing; it does not wait for the device, and all that
                changes from call to call is in tensors.
            inputs: on the device or on the host; what it is given is on the device.
        """
        key = (run, *((name, t.shape, t.dtype) for name, t in sorted(inputs.items())))
        began, is_new = perf_counter(), key not in self._met
        if key not in self._graphs and (is_new or len(self._graphs) >= self.most):
            self._met.add(key)
            if not is_new:
                self._tell_full()
            with self.workspace():
                run({name: self._moved(tensor) for name, tensor in inputs.items()})
            self.seconds += perf_counter() - began if is_new else 0.0
            return
        if key not in self._graphs:
            self._graphs[key] = self._record(run, inputs)
            self.seconds += perf_counter() - began
        graph = self._graphs[key]
        with self.workspace.on_stream():
            for name, place in graph.inputs.items():
                place.copy_(self._ready(inputs[name]), non_blocking=True)
            graph.graph.replay()

    def _tell_full(self) -> None:
        if self.most > 0 and not self._is_full:
            self._is_full = True
            self.say(
                f"note: {self.most} kinds of steps are recorded, by the shapes of their images and "
                "captions; all others are launched kernel by kernel, which is slower"
            )

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Forget every recording and give the memory back; waits for the device."""
        torch.cuda.synchronize(self.workspace.device)
        self._drop()
        self._met.clear()
        self.workspace.renew()

    def __del__(self) -> None:
        """Give the memory back before the workspace goes, in whichever order they are collected."""
        self._drop()

    def _drop(self) -> None:
        while self._graphs:
            self._graphs.popitem()[1].graph.reset()

    def _record(self, run: Run, inputs: Inputs) -> _Graph:
        device, workspace = self.workspace.device, self.workspace
        places = {name: torch.empty_like(t, device=device) for name, t in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        pool: Any = workspace.pool.id  # that of a handle, whose type is PyTorch's own
        with (
            _no_garbage(),
            # other threads may pin memory meanwhile, as those that read samples do
            torch.cuda.graph(
                graph, pool=pool, stream=workspace.stream, capture_error_mode="thread_local"
            ),
            torch.autograd.set_multithreading_enabled(False),
        ):
            run(places)
        return _Graph(graph, places)

    def _moved(self, tensor: Tensor) -> Tensor:
        return self._ready(tensor).to(self.workspace.device, non_blocking=True)

    def _ready(self, tensor: Tensor) -> Tensor:
        """In memory that a GPU reads by itself; a pageable copy would wait for the device."""
        return tensor if tensor.is_cuda else tensor.pin_memory()


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Nothing is collected within: what frees memory of a GPU would end a recording."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

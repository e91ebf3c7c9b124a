"""The micro-batches of each step, read ahead by workers and brought to the device in time."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import torch

from eri.errors import EriError, WorkerError
from eri.run.micro_batch import Packed, SampleBatch
from eri.run.workers import (
    AHEAD,
    SHARED_MEMORY,
    Load,
    Read,
    Source,
    WorkerDied,
    Workers,
    fits_shared_memory,
    worker_count,
)

__all__ = ["Loader", "worker_count"]

MOST_RESTARTS = 3  # in a run
HINT = "set train.workers: 0, or give the container more shared memory (docker run --shm-size=1g)"


class Loader:
    """A step of the run to its micro-batches on the device; a context manager around the run.

    With a GPU, the copy of a step begins before the step ahead of it is trained. Steps may be asked
    for in any order; those that follow each other are read ahead.

    Args:
        load: reads the micro-batches of a step.
        steps: that may be asked for, counted from 0.
        workers: processes that read; 0: this one does.
        device: where the tensors are wanted.
        say: is told when workers had to begin anew.
    """

    def __init__(
        self,
        load: Load,
        *,
        steps: range,
        workers: int,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self._steps = steps
        self._count = workers
        self._device = device
        self._say = say
        self._source = Source(load)
        self._workers: Workers | None = None
        self._restarts = 0
        self._next: tuple[int, Read] | None = None  # a step and what it is, on the device

    def __enter__(self) -> Self:
        """Bring the first step; workers, which take seconds to begin, begin meanwhile."""
        if self._steps:
            self._next = (self._steps.start, self._bring(self._steps.start))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_workers()

    def __call__(self, step: int) -> list[SampleBatch]:
        """The micro-batches of a step.

        Raises:
            ValueError: it is none of the steps.
            EriError: as `load` raised it, here or in a worker.
            WorkerError: workers keep dying.
        """
        if step not in self._steps:
            raise ValueError(f"step {step}: expected one of {self._steps}")
        found = self._bring(step)
        if isinstance(found, EriError):
            raise found
        if self._device.type == "cuda" and step + 1 in self._steps:
            self._next = (step + 1, self._bring(step + 1))
        return [batch.unpack() for batch in found]

    def _bring(self, step: int) -> Read:
        """What a step is, on the device; the copy may still run."""
        expected, self._next = self._next, None
        if expected is not None and expected[0] == step:
            return expected[1]
        found = self._read(step) if self._count else self._source[step]
        if isinstance(found, EriError):
            return found
        if self._device.type == "cuda" and not self._count:
            found = [batch.pin_memory() for batch in found]  # else the copy waits for the device
        return [batch.to(self._device) for batch in found]

    def _read(self, step: int) -> Read:
        """What a step is, from the workers if they are there and alive.

        If not, this process reads it, and the workers that begin meanwhile go on behind it.
        """
        workers = self._workers
        if workers is not None and workers.step == step:
            try:
                return workers.read()
            except WorkerDied as died:
                self._count_death(step, died)
        self._end_workers()
        found = self._source[step]
        if self._count and not isinstance(found, EriError):
            self._begin_workers(range(step + 1, self._steps.stop), found)
        return found

    def _begin_workers(self, steps: range, example: Sequence[Packed]) -> None:
        size = sum(batch.block.nbytes for batch in example)
        if not fits_shared_memory(self._count * AHEAD * size):
            self._count = 0
            self._say(f"note: {SHARED_MEMORY} is too small for workers; samples are read without")
        elif steps:
            pin = self._device.type == "cuda"
            self._workers = Workers(self._source, steps, count=self._count, pin=pin)

    def _end_workers(self) -> None:
        ended, self._workers = self._workers, None
        if ended is not None:
            ended.end()

    def _count_death(self, step: int, died: WorkerDied) -> None:
        what = f"a worker, which reads samples ahead, ended with {died}"
        if self._restarts == MOST_RESTARTS:
            again = f"; workers were begun anew {MOST_RESTARTS} times before"
            raise WorkerError(what + again, where=f"step {step + 1}", hint=HINT)
        self._restarts += 1
        self._say(f"note: {what}; going on from step {step + 1} with new workers")

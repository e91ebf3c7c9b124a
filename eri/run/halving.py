"""A step that runs out of memory is tried once more, with half as many images at once."""

from collections.abc import Callable, Sequence
from contextlib import suppress

from eri.errors import MemoryLimitError
from eri.run.memory import memory_errors
from eri.run.memory_plan import Mode
from eri.run.micro_batch import SampleBatch
from eri.train import Pending, Step

__all__ = ["Halving"]


class Halving:
    """Begins steps as `Step` does; where memory is short, with fewer samples at once.

    A step stays what it is: each of its samples counts as much, however they are divided.

    Args:
        step: begins them.
        mode: `train.memory`.
        at_once: samples at once at the most, as halved in an earlier session; None: not yet.
        say: is told of each size that is begun, in words.
        halved: is told of it, too.
    """

    def __init__(
        self,
        step: Step,
        *,
        mode: Mode,
        at_once: int | None,
        say: Callable[[str], None],
        halved: Callable[[int], None],
    ) -> None:
        self.step = step
        self.mode = mode
        self.at_once = at_once
        self.say = say
        self.halved = halved

    def __call__(self, batches: Sequence[SampleBatch], lr: float) -> Pending:
        """Begin one update from some micro-batches.

        Raises:
            MemoryLimitError: there is no memory for it, with half as many samples at once neither.
        """
        for is_first in (True, False):
            parts = self._divided(batches)
            pending = self._tried(parts, lr)
            if pending is not None:
                return pending
            self._require_whole()
            self.step.make_room()
            if is_first:
                self._halve(max(len(part) for part in parts))
        raise MemoryLimitError(
            f"out of memory, and again with {_images(self.at_once)} at once",
            where=f"step {self.step.state.step + 1}",
            hint=self._hint(),
        )

    def _divided(self, batches: Sequence[SampleBatch]) -> Sequence[SampleBatch]:
        if self.at_once is None:
            return batches
        return [part for batch in batches for part in batch.parts(self.at_once)]

    def _tried(self, batches: Sequence[SampleBatch], lr: float) -> Pending | None:
        """What was begun; None where memory ran out. The error is gone, and all that it held."""
        with suppress(MemoryLimitError), memory_errors():
            return self.step(batches, lr)
        return None

    def _require_whole(self) -> None:
        if not self.step.state.whole:
            raise MemoryLimitError(
                "out of memory within the update, which is not saved",
                where=f"step {self.step.state.step + 1}",
                hint=self._hint(),
            )

    def _halve(self, size: int) -> None:
        half = -(-size // 2)
        if half == self.at_once:
            return
        self.at_once = half
        self.halved(half)
        self.say(
            f"warning: out of memory in step {self.step.state.step + 1}; going on with "
            f"{_images(half)} at once, and with as many in a step as before"
        )

    def _hint(self) -> str:
        """The setting that takes less memory, and changes least."""
        if self.mode != "small":
            return "set train.memory: small, which runs a batch in the least memory"
        return "end what else takes memory, or train on a smaller data.resolution with --restart"


def _images(count: int | None) -> str:
    return "1 image" if count == 1 else f"{count} images"

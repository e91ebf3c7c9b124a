"""The training loop, on one screen."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

from eri.errors import EriError
from eri.train.log import Log
from eri.train.schedule import learning_rate
from eri.train.state import TrainState
from eri.train.step import MicroBatch, Pending

__all__ = ["Plan", "train"]

Batch = TypeVar("Batch", bound=MicroBatch)

AHEAD = 2  # steps that the host may be ahead of the device


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the loop has to know of a run's settings."""

    steps: int
    lr: float
    schedule: str
    warmup: int  # steps
    sample_every: int  # steps; 0: never
    save_every: int  # steps


def train(
    plan: Plan,
    state: TrainState,
    *,
    step: Callable[[Sequence[Batch], float], Pending],
    batches: Callable[[int], Sequence[Batch]],
    log: Log,
    sample: Callable[[int], object],
    save: Callable[[], None],
    stop: Callable[[], bool],
) -> None:
    """Train until the plan's last step, or until asked to stop; the state is saved on return.

    It is saved, too, where the next step cannot begin: for want of memory, or of its samples.

    Args:
        plan: the settings.
        state: what is trained, at the step to go on from.
        step: begins an update of it; see `Step`.
        batches: the micro-batches of a step, counted from 0; a pure function.
        log: is told of every step.
        sample: draws the previews of a step; those of the last step are the caller's.
        save: writes the state to disk, unless its step is there already.
        stop: whether the run was asked to stop.
    """
    running = _Running(log)
    while state.step < plan.steps and not stop():
        lr = learning_rate(
            plan.lr, plan.schedule, step=state.step, steps=plan.steps, warmup=plan.warmup
        )
        asked = perf_counter()
        try:
            micro_batches = batches(state.step)
            log.waited += perf_counter() - asked
            running.add(step(micro_batches, lr))
        except EriError:
            running.finish()
            if state.step and state.whole:
                save()
            raise
        state.step += 1
        running.finish(all_but=AHEAD)

        saves = _due(plan.save_every, state.step) or state.step == plan.steps
        samples = _due(plan.sample_every, state.step)
        if saves or samples:
            running.finish()
            if saves:
                save()
            if samples:
                sample(state.step)
            running.began = perf_counter()
    running.finish()
    if state.step:
        save()


class _Running:
    """Steps that were begun and not told of yet, in their order."""

    def __init__(self, log: Log) -> None:
        self.began = perf_counter()  # the oldest of them
        self._log = log
        self._steps: deque[Pending] = deque()

    def add(self, pending: Pending) -> None:
        self._steps.append(pending)

    def finish(self, *, all_but: int = 0) -> None:
        """Tell of the steps that are done, and wait for the oldest of the others."""
        while self._steps and (len(self._steps) > all_but or self._steps[0].is_done()):
            pending = self._steps.popleft()
            numbers = pending.result()
            ended = perf_counter()
            self._log.step(pending, numbers, lr=pending.lr, seconds=ended - self.began)
            self.began = ended


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0

"""The training loop, on one screen."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from eri.train.log import Log
from eri.train.schedule import learning_rate
from eri.train.state import TrainState
from eri.train.step import MicroBatch, Pending, Step

__all__ = ["Plan", "train"]

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
    step: Step,
    batches: Callable[[int], Sequence[MicroBatch]],
    log: Log,
    sample: Callable[[int], object],
    save: Callable[[], None],
    stop: Callable[[], bool],
) -> None:
    """Train until the plan's last step, or until asked to stop; the state is saved on return.

    Args:
        plan: the settings.
        state: what is trained, at the step to go on from.
        step: updates it.
        batches: the micro-batches of a step, counted from 0; a pure function.
        log: is told of every step.
        sample: draws the previews of a step; those of the last step are the caller's.
        save: writes the state to disk, unless its step is there already.
        stop: whether the run was asked to stop.
    """
    running: deque[tuple[Pending, float]] = deque()
    began = perf_counter()

    def finish(all_but: int) -> None:
        """Tell of the steps that are done, and wait for the oldest of the others."""
        nonlocal began
        while running and (len(running) > all_but or running[0][0].is_done()):
            pending, lr = running.popleft()
            numbers = pending.result()
            ended = perf_counter()
            log.step(pending, numbers, lr=lr, seconds=ended - began)
            began = ended

    while state.step < plan.steps and not stop():
        lr = learning_rate(
            plan.lr, plan.schedule, step=state.step, steps=plan.steps, warmup=plan.warmup
        )
        asked = perf_counter()
        micro_batches = batches(state.step)
        log.waited += perf_counter() - asked
        running.append((step(micro_batches, lr), lr))
        state.step += 1
        finish(AHEAD)

        saves = _due(plan.save_every, state.step) or state.step == plan.steps
        samples = _due(plan.sample_every, state.step)
        if saves or samples:
            finish(0)
            if saves:
                save()
            if samples:
                sample(state.step)
            began = perf_counter()
    finish(0)
    if state.step:
        save()


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0

"""The training loop, on one screen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from eri.train.log import Log
from eri.train.optimizers import learning_rate
from eri.train.state import TrainState
from eri.train.step import Loss, MicroBatch, update

__all__ = ["Plan", "train"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the loop has to know of a run's settings."""

    steps: int
    lr: float
    schedule: str
    warmup: int  # steps
    max_grad_norm: float | None
    sample_every: int  # steps; 0: never
    save_every: int  # steps


def train(
    plan: Plan,
    state: TrainState,
    *,
    loss: Loss,
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
        loss: the loss of each sample of a micro-batch.
        batches: the micro-batches of a step, counted from 0; a pure function.
        log: is told of every step.
        sample: draws the previews of a step; those of the last step are the caller's.
        save: writes the state to disk, unless its step is there already.
        stop: whether the run was asked to stop.
    """
    while state.step < plan.steps and not stop():
        began = perf_counter()
        micro_batches = batches(state.step)
        lr = learning_rate(
            plan.lr, plan.schedule, step=state.step, steps=plan.steps, warmup=plan.warmup
        )
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        numbers = update(state, loss, micro_batches, plan.max_grad_norm)
        state.step += 1
        log.step(state.step, numbers, lr=lr, seconds=perf_counter() - began, batches=micro_batches)

        if _due(plan.save_every, state.step) or state.step == plan.steps:
            save()
        if _due(plan.sample_every, state.step):
            sample(state.step)
    if state.step:
        save()


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0

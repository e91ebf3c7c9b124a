"""Training: the loop, the step, optimizers, what a run remembers, and what it says."""

from eri.train.log import Log, cut, say
from eri.train.loop import Plan, train
from eri.train.optimizers import OPTIMIZERS, learning_rate
from eri.train.state import TrainState
from eri.train.step import Loss, MicroBatch, StepNumbers, update

__all__ = [
    "OPTIMIZERS",
    "Log",
    "Loss",
    "MicroBatch",
    "Plan",
    "StepNumbers",
    "TrainState",
    "cut",
    "learning_rate",
    "say",
    "train",
    "update",
]

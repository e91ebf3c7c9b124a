"""Training: the loop, the step, the schedule, what a run remembers, and what it says."""

from eri.train.graphs import MOST, Graphs, Workspace
from eri.train.log import Log, cut, say
from eri.train.loop import Plan, train
from eri.train.schedule import learning_rate
from eri.train.state import TrainState
from eri.train.step import Loss, MicroBatch, Pending, Step, StepNumbers

__all__ = [
    "MOST",
    "Graphs",
    "Log",
    "Loss",
    "MicroBatch",
    "Pending",
    "Plan",
    "Step",
    "StepNumbers",
    "TrainState",
    "Workspace",
    "cut",
    "learning_rate",
    "say",
    "train",
]

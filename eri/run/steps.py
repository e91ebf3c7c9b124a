"""How many steps a run has."""

from fractions import Fraction

from eri.config import Train
from eri.data import Batches

__all__ = ["FEWEST_STEPS", "MOST_STEPS", "VIEWS_OF_AN_IMAGE", "run_samples", "run_steps"]

VIEWS_OF_AN_IMAGE = 100
FEWEST_STEPS, MOST_STEPS = 500, 3000
"""Guides and presets of other trainers take 1000 to 3000 steps at a rate of 1e-4; the fewer are for
folders of so few images that a third of it shows each a hundred times."""


def run_steps(train: Train, batches: Batches, images: int) -> int:
    """The steps of a run: as set, or so many that each image is seen 100 times, within limits.

    Args:
        train: its `steps`, `epochs`, `batch_size` and `accumulate`.
        batches: of the run.
        images: that count: those that something is learned from.
    """
    if batches.total is not None:
        return -(-batches.total // train.accumulate)
    if train.steps != "auto":
        return train.steps
    wanted = -(-VIEWS_OF_AN_IMAGE * images // (train.batch_size * train.accumulate))
    return min(max(wanted, FEWEST_STEPS), MOST_STEPS)


def run_samples(train: Train, batches: Batches, steps: int) -> int:
    """The samples that a run sees; on average, where its batches are not all full."""
    if batches.epochs is not None:
        return batches.epochs * batches.samples_per_epoch
    of_a_batch = Fraction(batches.samples_per_epoch) / batches.batches_per_epoch
    return round(of_a_batch * train.accumulate * steps)

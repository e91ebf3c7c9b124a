"""How many steps a run has."""

from collections.abc import Sequence
from fractions import Fraction
from math import ceil
from typing import NamedTuple

from eri.config import Train
from eri.data import Batches

__all__ = [
    "FEWEST_STEPS",
    "MOST_STEPS",
    "VIEWS_OF_AN_IMAGE",
    "AutoSteps",
    "auto_steps",
    "run_samples",
    "run_steps",
]

VIEWS_OF_AN_IMAGE = 100
FEWEST_STEPS, MOST_STEPS = 500, 3000
"""Guides and presets of other trainers take 1000 to 3000 steps at a rate of 1e-4; the fewer are for
folders of so few images that a third of it shows each a hundred times."""


class AutoSteps(NamedTuple):
    """`steps: auto`, with its arithmetic.

    Args:
        images: that something is learned from.
        of_a_step: samples of them in a step, on average: batches may be short, and hold others.
    """

    images: int
    of_a_step: Fraction

    @property
    def wanted(self) -> int:
        """Steps in which each of the images is seen so many times, on average."""
        return ceil(VIEWS_OF_AN_IMAGE * self.images / self.of_a_step)

    @property
    def steps(self) -> int:
        """The same within limits."""
        return min(max(self.wanted, FEWEST_STEPS), MOST_STEPS)


def auto_steps(train: Train, batches: Batches, learned: Sequence[int]) -> AutoSteps:
    """How many steps show each image 100 times.

    Args:
        train: its `accumulate`.
        batches: of the run.
        learned: the images that count: those that something is learned from.
    """
    counted = set(learned)
    of_an_epoch = sum(
        repeats
        for bucket in batches.buckets.values()
        for index, repeats in bucket.repeats.items()
        if index in counted
    )
    return AutoSteps(len(learned), of_an_epoch / batches.batches_per_epoch * train.accumulate)


def run_steps(train: Train, batches: Batches, learned: Sequence[int]) -> int:
    """The steps of a run: as set, as its epochs make, or so many that each image is seen 100 times.

    Args:
        train: its `steps` and `accumulate`.
        batches: of the run.
        learned: the images that count: those that something is learned from.
    """
    if batches.total is not None:
        return -(-batches.total // train.accumulate)
    if train.steps != "auto":
        return train.steps
    return auto_steps(train, batches, learned).steps


def run_samples(train: Train, batches: Batches, steps: int) -> int:
    """The samples that a run sees; on average, where its batches are not all full."""
    if batches.epochs is not None:
        return batches.epochs * batches.samples_per_epoch
    of_a_batch = Fraction(batches.samples_per_epoch) / batches.batches_per_epoch
    return round(of_a_batch * train.accumulate * steps)

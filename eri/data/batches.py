"""Which images a step sees, as a function of the seed and the step, and of nothing else.

No sampler has a state to save: a run that goes on at step 1000 asks for the batch of step 1000.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch

from eri.data.shapes import Shape
from eri.rng import generator

__all__ = ["Batch", "Batches"]


class Batch(NamedTuple):
    """The images of one forward pass.

    Args:
        indices: into the items; all of one shape, no two equal.
        samples: their numbers among all samples since the start of the run; what random draws are
            keyed by.
    """

    indices: tuple[int, ...]
    samples: range


class Batches:
    """The order of a run's images: every epoch each image once, in batches of one shape.

    Args:
        shapes: the shape of every item; items of different shapes never share a batch.
        batch_size: images in a batch; the last batch of a shape is as long as what is left.
        seed: the run's seed.
    """

    def __init__(self, shapes: Sequence[Shape], *, batch_size: int, seed: int) -> None:
        if not shapes or batch_size < 1:
            raise ValueError(f"{len(shapes)} images in batches of {batch_size}")
        self.shapes = tuple(shapes)
        self.batch_size = batch_size
        self.seed = seed
        sizes = [self.shapes.count(shape) for shape in set(self.shapes)]
        self.steps_per_epoch = sum(-(-size // batch_size) for size in sizes)
        self._epoch: tuple[int, list[Batch]] = (0, self._order(0))

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        return self._epoch[1][position]

    def _order(self, epoch: int) -> list[Batch]:
        random = generator(self.seed, "order", step=epoch)
        buckets: defaultdict[Shape, list[int]] = defaultdict(list)
        for index in torch.randperm(len(self.shapes), generator=random).tolist():
            buckets[self.shapes[index]].append(index)
        groups = [
            tuple(bucket[start : start + self.batch_size])
            for bucket in buckets.values()
            for start in range(0, len(bucket), self.batch_size)
        ]
        first = epoch * len(self.shapes)
        batches = []
        for position in torch.randperm(len(groups), generator=random).tolist():
            group = groups[position]
            batches.append(Batch(group, range(first, first + len(group))))
            first += len(group)
        return batches

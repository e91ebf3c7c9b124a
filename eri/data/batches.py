"""Which images a step sees, as a function of the seed and the step, and of nothing else.

No sampler has a state to save: a run that goes on at step 1000 asks for the batch of step 1000.

Every image is seen exactly as often as its repeats say, never twice in a batch, and shapes never
mix. The images of one shape are a bucket. A bucket that holds a batch runs full batches only: what
is left of an epoch is carried into the next one, at most once an image. A smaller bucket runs as
many short batches as the largest of its repeats.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from fractions import Fraction
from math import gcd
from typing import NamedTuple, TypeVar

import torch

from eri.data.shapes import Shape
from eri.rng import generator

__all__ = ["Batch", "Batches", "Bucket"]

Thing = TypeVar("Thing")


class Batch(NamedTuple):
    """The images of one forward pass.

    Args:
        indices: into the items; all of one shape, no two equal.
        samples: their numbers among all samples since the start of the run; what random draws are
            keyed by.
    """

    indices: tuple[int, ...]
    samples: range


class Bucket:
    """The images of one shape, and the batches that each epoch makes of them.

    Args:
        repeats: of each image, by its index; what an epoch shows of it.
        batch_size: images in a full batch.
        seed: the run's seed.
        number: of this bucket among those of the run.
    """

    def __init__(self, repeats: dict[int, int], *, batch_size: int, seed: int, number: int) -> None:
        self.repeats = repeats
        self.samples = sum(repeats.values())
        """In an epoch."""
        self.carries = self.samples >= batch_size * max(repeats.values())
        """Whether there are full batches only, and leftovers go to the next epoch."""
        self.batches_per_epoch = (
            Fraction(self.samples, batch_size) if self.carries else Fraction(max(repeats.values()))
        )
        """On average."""
        self._size, self._seed, self._number = batch_size, seed, number
        self._known: tuple[int, tuple[int, ...]] = (0, ())  # an epoch and what is carried into it

    def batches_before(self, epoch: int) -> int:
        """Batches of all earlier epochs."""
        return int(epoch * self.batches_per_epoch)

    def samples_before(self, epoch: int) -> int:
        """Samples in them."""
        return self.batches_before(epoch) * self._size if self.carries else epoch * self.samples

    def batches(self, epoch: int) -> list[tuple[int, ...]]:
        """The batches of an epoch, in no order."""
        return self._split(epoch, self.left(epoch))[0]

    def left(self, epoch: int) -> tuple[int, ...]:
        """The images, all different, that so many epochs leave for the next one.

        There are none whenever the epochs before fill their batches, so only the epochs since then
        have to be worked out, fewer than a batch has images.
        """
        if not self.carries:
            return ()
        since = epoch - epoch % (self._size // gcd(self.samples, self._size))
        known, carried = self._known
        if not since <= known <= epoch:
            known, carried = since, ()
        for earlier in range(known, epoch):
            carried = self._split(earlier, carried)[1]
        self._known = (epoch, carried)
        return carried

    def _split(
        self, epoch: int, carried: tuple[int, ...]
    ) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
        """The batches of an epoch, and what it leaves.

        Images in a random order, those shown most often first: of the first ones one showing each
        is left, and the others are dealt to the batches in turn (McNaughton's wrap-around rule),
        so that the showings of one image, which follow each other, come to different batches.
        Where no image has more showings than there are batches that is always possible: a bucket
        that carries has at least as many batches as repeats, and an image carried into such an
        epoch is among those left, because at least as many are left as were carried.
        """
        counts = Counter(self.repeats)
        counts.update(carried)
        full, rest = divmod(counts.total(), self._size) if self.carries else (0, 0)
        random = generator(self._seed, "order", step=epoch, sample=self._number)
        images = _shuffled(list(self.repeats), random)
        images.sort(key=lambda image: -counts[image])
        left = tuple(images[:rest])
        counts.subtract(left)
        images.sort(key=lambda image: -counts[image])
        number = full or max(self.repeats.values())
        batches: list[list[int]] = [[] for _ in range(number)]
        showings = (image for image in images for _ in range(counts[image]))
        for place, image in enumerate(showings):
            batches[place % number].append(image)
        return [tuple(batch) for batch in batches], left


class Batches:
    """The order of a run's images.

    Args:
        shapes: of every item; items of different shapes never share a batch.
        repeats: how often an epoch shows each item; once unless said.
        batch_size: images in a batch.
        seed: the run's seed.
        epochs: after which the run ends, with short batches of what is left then; None: it goes on.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        repeats: Sequence[int] | None = None,
        *,
        batch_size: int,
        seed: int,
        epochs: int | None = None,
    ) -> None:
        if not shapes or batch_size < 1:
            raise ValueError(f"{len(shapes)} images in batches of {batch_size}")
        self.batch_size = batch_size
        self.seed = seed
        self.epochs = epochs
        grouped: defaultdict[Shape, dict[int, int]] = defaultdict(dict)
        for index, (shape, count) in enumerate(
            zip(shapes, repeats or [1] * len(shapes), strict=True)
        ):
            grouped[shape][index] = count
        self.buckets = {
            shape: Bucket(grouped[shape], batch_size=batch_size, seed=seed, number=number)
            for number, shape in enumerate(sorted(grouped), start=1)
        }
        """By their shape."""
        buckets = self.buckets.values()
        self.samples_per_epoch = sum(bucket.samples for bucket in buckets)
        self.batches_per_epoch = sum((b.batches_per_epoch for b in buckets), Fraction())
        """On average."""
        self._last = [] if epochs is None else [left for b in buckets if (left := b.left(epochs))]
        self.total = None if epochs is None else self._before(epochs) + len(self._last)
        """Batches of the whole run; None where it has no last epoch."""
        self._epoch: tuple[int, list[Batch]] = (-1, [])

    def batch(self, number: int) -> Batch:
        """A batch of the run, counted from 0.

        Raises:
            ValueError: the run has not so many.
        """
        if self.total is not None and number >= self.total:
            raise ValueError(f"batch {number} of a run of {self.total}")
        epoch = int(number / self.batches_per_epoch)
        epoch += self._before(epoch + 1) <= number  # the average is at most one epoch off
        if self.epochs is not None:
            epoch = min(epoch, self.epochs - 1)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        return self._epoch[1][number - self._before(epoch)]

    def _before(self, epoch: int) -> int:
        return sum(bucket.batches_before(epoch) for bucket in self.buckets.values())

    def _order(self, epoch: int) -> list[Batch]:
        groups = [batch for bucket in self.buckets.values() for batch in bucket.batches(epoch)]
        random = generator(self.seed, "order", step=epoch)
        ordered = _shuffled(groups, random)
        if epoch + 1 == self.epochs:
            ordered += self._last
        first = sum(bucket.samples_before(epoch) for bucket in self.buckets.values())
        batches = []
        for images in ordered:
            batches.append(Batch(images, range(first, first + len(images))))
            first += len(images)
        return batches


def _shuffled(things: list[Thing], random: torch.Generator) -> list[Thing]:
    return [things[n] for n in torch.randperm(len(things), generator=random).tolist()]

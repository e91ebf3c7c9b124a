"""The samples of a run: what step n trains on, from what is kept in the cache.

Everything here is read by processes that read ahead, so it holds paths and settings, no tensors.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

from eri.data import Batches, Latents, Texts, View, caption_of, plain_caption, whole_captions
from eri.printable import printable
from eri.rng import generator
from eri.run.image_set import ImageSet
from eri.run.micro_batch import Sample, SampleBatch, size_tensor

__all__ = [
    "Samples",
    "Steps",
    "Text",
    "by_chance",
    "micro_batches",
    "plain_text",
    "texts_drawn",
    "texts_of",
    "whole_texts",
]

Text = tuple[str, bool]
"""A caption, and whether the weights in it count."""


class Samples(Sequence[Sample]):
    """Encoded images with their captions, read when they are asked for.

    Args:
        images: checked ones.
        latents: of their `cuts`, in the same order.
        texts: the states of their captions, by whether weights count.
        windows: in which every caption was read.
        seed: of the run, from which versions and captions are drawn.
    """

    def __init__(
        self,
        images: ImageSet,
        latents: Latents,
        texts: Mapping[bool, Texts],
        *,
        windows: int,
        seed: int,
    ) -> None:
        self.images = images
        self.latents = latents
        self.texts = texts
        self.windows = windows
        self.seed = seed
        self._first = [0, *accumulate(len(versions) for versions in images.views)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # no slices
        """An image in its first version, with its plain caption."""
        return self._sample(index, 0, plain_text(self.images, index))

    def of_number(self, index: int, number: int) -> Sample:
        """An image as sample `number` of the run shows it."""
        versions, version = len(self.images.views[index]), 0
        if versions > 1:
            draws = generator(self.seed, "view", sample=number)
            version = int(torch.randint(versions, (), generator=draws))
        return self._sample(index, version, text_of(self.images, index, number, self.seed))

    def _sample(self, index: int, version: int, text: Text) -> Sample:
        item, source = self.images.items[index], self.images.source(index)
        latent = self.latents[self._first[index] + version]
        caption, weighted = text
        states = self.texts[weighted][caption]
        view: View = self.images.views[index][version]
        sizes = size_tensor(item.width, item.height, self.images.shapes[index], view)
        return Sample(
            file=printable(_told(item.path, source.path)),
            mean=latent.mean,
            std=latent.std,
            context=states.context,
            pooled=states.pooled,
            time_ids=None if states.pooled is None else sizes,
            mask=latent.mask,
            unmasked_weight=source.unmasked_weight,
            weight=source.weight,
        )


def _told(path: Path, folder: Path) -> str:
    """An image as the log of a run names it: the path to its folder is nobody else's business."""
    name = os.path.basename(os.path.abspath(folder))
    return os.path.join(name, os.path.relpath(path, folder))


@dataclass(frozen=True)
class Steps:
    """What is run for each step: batches, or parts of them where the memory does not hold a batch.

    How batches are divided changes neither what a step is made of nor its order.

    Args:
        samples: to train on.
        batches: their order.
        accumulate: batches in a step; the last step of a run of epochs may have fewer.
        at_once: samples that are run at once, at most; None: whole batches.
    """

    samples: Samples
    batches: Batches
    accumulate: int
    at_once: int | None = None

    def __call__(self, step: int) -> list[SampleBatch]:
        """The parts of a step, counted from 0, in their order."""
        found = []
        for number in micro_batches(self.batches, self.accumulate, range(step, step + 1)):
            pairs = list(zip(*self.batches.batch(number), strict=True))
            size = self.at_once or len(pairs)
            parts = (pairs[first : first + size] for first in range(0, len(pairs), size))
            found += [self._part(part) for part in parts]
        return found

    def _part(self, pairs: Sequence[tuple[int, int]]) -> SampleBatch:
        samples = [self.samples.of_number(*pair) for pair in pairs]
        return SampleBatch(samples, [number for _, number in pairs])


def micro_batches(batches: Batches, accumulate: int, steps: range) -> range:
    """The numbers of the micro-batches of some steps."""
    end = steps.stop * accumulate
    return range(
        steps.start * accumulate, end if batches.total is None else min(end, batches.total)
    )


def texts_of(images: ImageSet) -> Iterator[Text]:
    """The plain caption of each image."""
    return (plain_text(images, index) for index in range(len(images)))


def whole_texts(images: ImageSet) -> Iterator[tuple[int, Text]]:
    """Every caption that an image can have, with nothing left out of it, by the image's index."""
    for index, item in enumerate(images.items):
        source = images.source(index)
        for caption in whole_captions(
            item.captions, source.caption, regularization=source.regularization
        ):
            yield index, (caption, source.caption.weights)


def texts_drawn(
    images: ImageSet, batches: Batches, numbers: Iterable[int], seed: int
) -> Iterator[Text]:
    """What chance makes of the captions of the samples in some micro-batches of a run.

    Nothing where captions hang on no chance: then the plain ones are all there are.
    """
    if not by_chance(images):
        return
    for number in numbers:
        for index, sample in zip(*batches.batch(number), strict=True):
            yield text_of(images, index, sample, seed)


def by_chance(images: ImageSet) -> bool:
    """Whether the captions of samples hang on chance."""
    rules = (source.caption for source in images.sources)
    return any(one.varies or one.drop > 0 or one.lines for one in rules) or any(
        len(item.captions) > 1 for item in images.items
    )


def plain_text(images: ImageSet, index: int) -> Text:
    """The caption of an image where nothing is left to chance."""
    source = images.source(index)
    captions, rules = images.items[index].captions, source.caption
    return plain_caption(captions, rules, regularization=source.regularization), rules.weights


def text_of(images: ImageSet, index: int, number: int, seed: int) -> Text:
    """The caption that an image has as sample `number` of the run."""
    source = images.source(index)
    captions, rules = images.items[index].captions, source.caption
    caption = caption_of(
        captions, rules, seed=seed, sample=number, regularization=source.regularization
    )
    return caption, rules.weights

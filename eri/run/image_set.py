"""The checked images of a run, and how each is cut, varied and repeated.

Worker processes import this file: it stays free of models and everything else that is slow to load.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from eri.config import DataSource
from eri.data import PLAIN, Cut, Geometry, Item, Shape, View, geometry, views

__all__ = ["ImageSet"]


@dataclass(frozen=True)
class ImageSet:
    """Checked images, and the shape that each is cut to."""

    items: tuple[Item, ...] = ()
    shapes: tuple[Shape, ...] = ()
    sources: tuple[DataSource, ...] = ()
    resolution: int = 0  # side of the largest square whose area they are scaled to
    joined: int = 0  # images that took their neighbours' shape
    windows: int = 1  # of the text encoder, that hold every caption as far as it reads

    def __len__(self) -> int:
        return len(self.items)

    def source(self, index: int) -> DataSource:
        """The folder that an image is from, with its settings."""
        return self.sources[self.items[index].source]

    @cached_property
    def learned(self) -> tuple[int, ...]:
        """The images that something is learned from; all, if every folder is for regularization."""
        own = (n for n in range(len(self)) if not self.source(n).regularization)
        return tuple(own) or tuple(range(len(self)))

    @cached_property
    def views(self) -> tuple[tuple[View, ...], ...]:
        """The versions of each image."""
        return tuple(
            views(item.sha256, self.source(index)) for index, item in enumerate(self.items)
        )

    @cached_property
    def cuts(self) -> tuple[Cut, ...]:
        """Every version of every image, in this order."""
        return tuple(
            Cut(item, shape, view)
            for item, shape, versions in zip(self.items, self.shapes, self.views, strict=True)
            for view in versions
        )

    @property
    def unmoved(self) -> list[Path]:
        """The images of which `crop_jitter` makes no other cut than there would be without it."""

        def cut(index: int, view: View = PLAIN) -> Geometry:
            item = self.items[index]
            return geometry(item.width, item.height, self.shapes[index], view)

        return [
            self.items[index].path
            for index in range(len(self))
            if self.source(index).crop_jitter > 0
            and all(cut(index, view) == cut(index) for view in self.views[index])
        ]

    @cached_property
    def repeats(self) -> tuple[int, ...]:
        """How often an epoch shows each image."""
        return tuple(self.source(index).repeats for index in range(len(self)))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of what is trained on: bytes, captions, masks and cuts in order."""
        digest = hashlib.sha256()
        for cut in self.cuts:
            item = cut.item
            mask = item.mask and (item.mask.sha256, item.mask.alpha)
            what = [item.source, item.sha256, item.captions, item.background, mask]
            what += [cut.shape, cut.view]
            digest.update(json.dumps(what).encode())
        return digest.hexdigest()

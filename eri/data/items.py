"""What a run trains on: checked images with their captions, and what else came to light."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eri.printable import printable

__all__ = ["Dataset", "Fault", "Item", "Mask", "Progress", "Thing"]

Progress = Callable[[int, int], None]
"""Called with what is done and the total."""

Thing = Literal["image", "row", "table", "folder"]
"""What a fault makes unusable: an image with what lies beside it, a row of a table of captions, a
whole table or the rest of it, a folder in the folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mask:
    """Where it is written which parts of an image are learned.

    Args:
        path: of the mask; of the image itself, where its transparency is the mask.
        sha256: of the file's bytes, in hex.
        alpha: whether the transparency is meant and not the brightness.
    """

    path: Path
    sha256: str
    alpha: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A checked image with its captions.

    Args:
        captions: as they are written, at least one; of several, each sample shows one.
        width: pixels, upright (after EXIF).
        height: pixels, upright.
        sha256: of the file's bytes, in hex.
        source: index of the source that it belongs to.
        background: color that its transparent parts are laid on; None where it has none.
        mask: None where all of it is learned.
    """

    path: Path
    captions: tuple[str, ...]
    width: int
    height: int
    sha256: str
    source: int
    background: str | None = None
    mask: Mask | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a file cannot be used, and what to do about it.

    Args:
        path: of the file that is to be mended.
        what: the reason; the thing to do.
        line: of a file of many captions; 0 where it is about the whole file.
        skippable: whether `on_bad: skip` goes on without it.
        thing: what cannot be used for it.
    """

    path: Path
    what: str
    line: int = 0
    skippable: bool = True
    thing: Thing = "image"

    def __str__(self) -> str:
        line = f":{self.line}" if self.line else ""
        return f"{printable(self.path)}{line}: {self.what}"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What a run trains on.

    Args:
        items: in the order of the sources, and in each folder by folder and name by name.
        skipped: one line for each file that `on_bad: skip` left out.
        notes: what else the owner of the images may want to know.
    """

    items: tuple[Item, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]

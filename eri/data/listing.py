"""What a folder holds, by the names in it: images with what lies beside them, and the rest.

Names decide, and no file is opened but those that are named as images of other kinds: one that is a
JPEG all the same is an image like others. Nothing is passed over silently: what is neither an image
nor belongs to one is a fault or is named in a note.
"""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from eri.data.captions import CAPTION_SUFFIXES
from eri.data.images import format_of
from eri.data.items import Fault
from eri.data.tables import TABLE_NAMES
from eri.errors import DataError
from eri.files import LOCK_FILE
from eri.printable import printable

__all__ = ["FOLDER_HINT", "ByName", "Candidate", "Listing", "list_folder", "note"]

Thing = TypeVar("Thing")

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif"}
)
RAW_SUFFIXES = frozenset({".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"})
"""Of raw photos. Most are TIFFs, of which a reader of TIFF sees a thumbnail only."""

FOREIGN_SUFFIXES = RAW_SUFFIXES | frozenset(
    {".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".tga", ".exr", ".hdr", ".ico"}
)
"""Of images that this program does not read."""

MASK_ENDINGS = ("-masklabel.png", ".mask.png")
"""How the mask of an image is called behind the image's own stem; the first is OneTrainer's."""

FOLDER_HINT = "data: names a folder of images with captions"
NAMES_IN_A_NOTE = 5


class ByName(Generic[Thing]):
    """Things by paths. One whose path differs in nothing but its Unicode normal form, as files have
    that went through a Mac, is found too, unless there is one of the very path.
    """

    def __init__(self) -> None:
        self._groups: defaultdict[str, list[tuple[str, Thing]]] = defaultdict(list)

    def add(self, path: Path, thing: Thing) -> None:
        """Keeps one more thing by its path."""
        self._groups[_composed(path)].append((str(path), thing))

    def find(self, path: Path) -> list[Thing]:
        """All that is kept by a path."""
        group = self._groups.get(_composed(path), [])
        exact = [thing for name, thing in group if name == str(path)]
        return exact or [thing for _, thing in group]

    def twins(self) -> Iterator[list[Thing]]:
        """Things whose paths look the same and are not."""
        for group in self._groups.values():
            if len({name for name, _ in group}) > 1:
                yield [thing for _, thing in group]


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A file that should be an image, and the caption and mask files beside it."""

    path: Path
    captions: tuple[Path, ...]
    masks: tuple[Path, ...] = ()


@dataclass(kw_only=True)
class Listing:
    """A folder's candidates, its tables of captions, what is refused by its name, and notes."""

    candidates: list[Candidate] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    refused: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def list_folder(top: Path) -> Listing:
    """Lists a folder with its subfolders, in an order that is the same on every machine.

    Hidden files and folders are left out; links to folders are not followed.

    Raises:
        DataError: there is no such folder, or no image in it.
    """
    if not os.path.isdir(top):
        what = "not a folder" if os.path.lexists(top) else "no such folder"
        raise DataError(what, where=printable(top), hint=FOLDER_HINT)
    listing = Listing()
    images: list[Path] = []
    captions: list[Path] = []
    others: list[Path] = []
    for path in _walk(top, listing):
        suffix = path.suffix.lower()
        if suffix in IMAGE_SUFFIXES or (suffix in FOREIGN_SUFFIXES and _reads(path, listing)):
            images.append(path)
        elif path.name in TABLE_NAMES:
            listing.tables.append(path)
        elif suffix in CAPTION_SUFFIXES:
            captions.append(path)
        elif suffix not in FOREIGN_SUFFIXES:
            others.append(path)
    if not images and not listing.refused:
        raise DataError("no image in this folder", where=printable(top), hint=FOLDER_HINT)
    others += _gather(listing, images, captions)
    listing.notes += note("files that are neither images nor captions, not read", others)
    return listing


def note(what: str, things: Sequence[Path | str]) -> list[str]:
    """One line on some things, the first of them by name; nothing where there are none."""
    if not things:
        return []
    names = ", ".join(printable(thing) for thing in things[:NAMES_IN_A_NOTE])
    more = f" and {len(things) - NAMES_IN_A_NOTE} more" if len(things) > NAMES_IN_A_NOTE else ""
    return [f"{what} ({len(things)}): {names}{more}"]


def _reads(path: Path, listing: Listing) -> bool:
    """Whether a file is of a known format though it is not named so; else it is refused."""
    suffix = path.suffix.lower()
    try:
        found = format_of(path)
    except DataError as error:
        listing.refused.append(Fault(path, error.what))
        return False
    if found is not None and not (found == "TIFF" and suffix in RAW_SUFFIXES):
        return True
    what = f"images of the kind {printable(suffix)} are not read; save it as PNG"
    listing.refused.append(Fault(path, what))
    return False


def _gather(listing: Listing, found: Sequence[Path], captions: Sequence[Path]) -> list[Path]:
    """Gives every image the files that belong to it by their names, and tells which are left.

    Returns:
        The JSON files that belong to none: they may be anything.
    """
    refused = [fault.path for fault in listing.refused if fault.thing == "image"]
    of_another = _masks(found, refused)
    masks = [path for path in found if path in of_another]
    images = [path for path in found if path not in of_another]
    by_stem, masks_by_stem, same = ByName[Path](), ByName[Path](), ByName[Path]()
    for path in captions:
        by_stem.add(path.with_suffix(""), path)
    for path in masks:
        masks_by_stem.add(_masked(path), path)
    used: set[Path] = set()
    for path in images:
        stem = path.with_suffix("")
        beside = (*by_stem.find(stem), *by_stem.find(path))  # cat.txt and cat.png.txt
        covers = masks_by_stem.find(stem)
        listing.candidates.append(Candidate(path=path, captions=beside, masks=tuple(covers)))
        used.update(beside, covers)
        same.add(path, path)
    for path in refused:  # what lies beside it is not to blame
        stem = path.with_suffix("")
        used.update(by_stem.find(stem), by_stem.find(path), masks_by_stem.find(stem))
    pairs = [" and ".join(ascii(path.name) for path in twins) for twins in same.twins()]
    orphans = [path for path in captions if path not in used]
    texts = [path for path in orphans if path.suffix.lower() != ".json"]
    listing.notes += note("captions without an image", texts)
    unclaimed = [path for path in masks if path not in used]
    listing.notes += note("masks of an image that has one in its own Unicode form", unclaimed)
    alone = [path for path in images if _named_as_mask(path)]
    listing.notes += note("named like the mask of an image that is not here, so an image", alone)
    listing.notes += note("names that differ in nothing but their Unicode form", pairs)
    return [path for path in orphans if path.suffix.lower() == ".json"]


def _masks(found: Sequence[Path], refused: Sequence[Path]) -> set[Path]:
    """Which of the images are the mask of another one, by their names."""
    stems = ByName[Path]()
    for path in (*found, *refused):
        if not _named_as_mask(path):
            stems.add(path.with_suffix(""), path)
    masks: set[Path] = set()
    named = [path for path in found if _named_as_mask(path)]
    for path in sorted(named, key=lambda path: len(_composed(path))):  # a mask's image comes first
        if stems.find(_masked(path)):
            masks.add(path)
        else:
            stems.add(path.with_suffix(""), path)
    return masks


def _named_as_mask(path: Path) -> bool:
    name = path.name.lower()
    return name.endswith(MASK_ENDINGS) and name not in MASK_ENDINGS


def _masked(path: Path) -> Path:
    """A mask's path without its ending: the stem of the image that it is of."""
    ending = next(ending for ending in MASK_ENDINGS if path.name.lower().endswith(ending))
    return path.parent / path.name[: -len(ending)]


def _composed(path: Path) -> str:
    return unicodedata.normalize("NFC", str(path))


def _walk(top: Path, listing: Listing) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        what = f"the folder cannot be read: {error.strerror}; make it readable, or remove it"
        listing.refused.append(Fault(Path(error.filename), what, thing="folder"))

    links: list[Path] = []
    disguised: list[Path] = []
    runs: list[Path] = []
    for folder, folders, names in os.walk(top, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = [Path(folder, name) for name in folders]
        of_runs = [path for path in here if (path / LOCK_FILE).exists()]  # their previews are ours
        folders[:] = [name for name in folders if Path(folder, name) not in of_runs]
        runs += of_runs
        links += [path for path in here if path.is_symlink()]
        disguised += [path for path in here if path.suffix.lower() in IMAGE_SUFFIXES]
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))
    listing.notes += note("folders of runs, not searched", runs)
    listing.notes += note("links to folders, not followed", links)
    listing.notes += note("folders named like images, searched as folders", disguised)

"""What a folder holds, by the names in it: images with the captions beside them, and the rest.

No file is opened here. Nothing is passed over silently: what is neither an image nor a caption of
one is a fault or is named in a note.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eri.data.captions import CAPTION_SUFFIXES
from eri.errors import DataError
from eri.printable import printable

__all__ = ["FOLDER_HINT", "Candidate", "Listing", "list_folder", "note"]

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif"}
)
FOREIGN_SUFFIXES = frozenset(
    {".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".tga", ".exr", ".hdr", ".ico", ".dng"}
    | {".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"}
)
"""Images that this program does not read."""

FOLDER_HINT = "data: names a folder of images with captions"
NAMES_IN_A_NOTE = 5


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A file that should be an image, and the caption files beside it."""

    path: Path
    captions: tuple[Path, ...]


@dataclass(kw_only=True)
class Listing:
    """A folder's candidates, one line for each file that is refused by its name, and notes."""

    candidates: list[Candidate] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
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
    captions: defaultdict[Path, list[Path]] = defaultdict(list)
    others: list[Path] = []
    for path in _walk(top, listing):
        suffix = path.suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            images.append(path)
        elif suffix in CAPTION_SUFFIXES:
            captions[path.with_suffix("")].append(path)
        elif suffix in FOREIGN_SUFFIXES:
            what = f"images of the kind {printable(suffix)} are not read; save it as PNG"
            listing.refused.append(f"{printable(path)}: {what}")
        else:
            others.append(path)
    for path in images:
        beside = captions.get(path.with_suffix(""), ())
        listing.candidates.append(Candidate(path=path, captions=tuple(beside)))
    for path in images:
        captions.pop(path.with_suffix(""), None)
    orphans = [path for paths in captions.values() for path in paths]
    listing.notes += note("captions without an image", orphans)
    listing.notes += note("files that are neither images nor captions, not read", others)
    if not images and not listing.refused:
        raise DataError("no image in this folder", where=printable(top), hint=FOLDER_HINT)
    return listing


def note(what: str, paths: Sequence[Path]) -> list[str]:
    """One line on some files, the first of them by name; nothing where there are no files."""
    if not paths:
        return []
    names = ", ".join(printable(path) for path in paths[:NAMES_IN_A_NOTE])
    more = f" and {len(paths) - NAMES_IN_A_NOTE} more" if len(paths) > NAMES_IN_A_NOTE else ""
    return [f"{what} ({len(paths)}): {names}{more}"]


def _walk(top: Path, listing: Listing) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        what = f"the folder cannot be read: {error.strerror}"
        listing.refused.append(f"{printable(str(error.filename))}: {what}")

    links: list[Path] = []
    for folder, folders, names in os.walk(top, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links += [path for name in folders if (path := Path(folder, name)).is_symlink()]
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))
    listing.notes += note("links to folders, not followed", links)

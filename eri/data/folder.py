"""Folders of images to a checked list of items: everything is read before anything is trained.

Every image is decoded to its last pixel and every caption read, and all that is wrong is told at
once.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from eri.config import DataSource
from eri.data.captions import caption_from_name, read_caption
from eri.data.images import PIXEL_CAP, decode, pillow_warnings_ignored
from eri.data.listing import FOLDER_HINT, Candidate, Listing, list_folder
from eri.errors import DataError
from eri.printable import printable

__all__ = ["Dataset", "Item", "Mask", "Progress", "scan"]

Progress = Callable[[int, int], None]
"""Called with what is done and the total."""

MAX_WORKERS = 4  # threads; Pillow lets go of the interpreter while it decodes


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, kw_only=True)
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

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of what is trained on: the bytes and captions in their order."""
        digest = hashlib.sha256()
        for item in self.items:
            captions = hashlib.sha256(json.dumps(item.captions).encode()).hexdigest()
            mask = item.mask.sha256 if item.mask else ""
            digest.update(f"{item.source} {item.sha256} {captions} {mask}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A file to check, and what its source says about missing captions and bad files."""

    candidate: Candidate
    source: DataSource
    index: int


@dataclass(frozen=True, kw_only=True)
class _Fault:
    """Why a file is not an item, and whether the run may go on without it."""

    line: str
    skip: bool


def scan(
    sources: Sequence[DataSource],
    *,
    pixel_cap: int = PIXEL_CAP,
    progress: Progress | None = None,
) -> Dataset:
    """Finds, decodes and checks every image of some folders and reads their captions.

    Args:
        sources: folders, each with what to do about missing captions and bad files.
        pixel_cap: the most pixels an image may have.
        progress: called as files are checked.

    Raises:
        DataError: a folder is missing or empty, or files cannot be used; lists all of them.
    """
    listings = _list_folders(sources)
    tasks = [
        _Task(candidate=candidate, source=source, index=index)
        for index, (source, listing) in enumerate(zip(sources, listings, strict=True))
        for candidate in listing.candidates
    ]
    items: list[Item] = []
    faults = [
        _Fault(line=line, skip=source.on_bad == "skip")
        for source, listing in zip(sources, listings, strict=True)
        for line in listing.refused
    ]
    for done, result in enumerate(_checked(tasks, pixel_cap), start=1):
        if isinstance(result, Item):
            items.append(result)
        else:
            faults.append(result)
        if progress is not None:
            progress(done, len(tasks))
    notes = [line for listing in listings for line in listing.notes]
    skipped = [fault.line for fault in faults if fault.skip]
    _refuse(sources, items, faults, notes)
    return Dataset(items=tuple(items), skipped=tuple(skipped), notes=(*notes, *_duplicates(items)))


def _list_folders(sources: Sequence[DataSource]) -> list[Listing]:
    listings, refused = [], []
    for source in sources:
        try:
            listings.append(list_folder(source.path))
        except DataError as error:
            refused.append(error)
    if len(refused) > 1:
        what = f"{len(refused)} of {len(sources)} folders cannot be used"
        raise DataError(what, hint=FOLDER_HINT, problems=[str(error) for error in refused])
    if refused:
        raise refused[0]
    return listings


def _refuse(
    sources: Sequence[DataSource],
    items: Sequence[Item],
    faults: Sequence[_Fault],
    notes: Sequence[str],
) -> None:
    """Stops if a file has a fault that may not be skipped, or a source has no item left."""
    fatal = [fault.line for fault in faults if not fault.skip]
    if fatal:
        raise DataError(
            f"{len(fatal)} of {len(items) + len(faults)} images cannot be used",
            where=", ".join(printable(source.path) for source in sources),
            hint="mend or remove them, or set on_bad: skip for files that cannot be read and "
            "missing_caption: empty or filename for images without a caption",
            problems=(*fatal, *(f"note: {line}" for line in notes)),
        )
    used = {item.source for item in items}
    for index, source in enumerate(sources):
        if index not in used:
            raise DataError(
                "no image is left; every one was skipped",
                where=printable(source.path),
                hint="mend the files, or name another folder",
                problems=[fault.line for fault in faults],
            )


def _checked(tasks: Sequence[_Task], pixel_cap: int) -> Iterator[Item | _Fault]:
    workers = min(MAX_WORKERS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="check")
    with pillow_warnings_ignored():
        try:
            yield from pool.map(lambda task: _check(task, pixel_cap), tasks)
        finally:
            pool.shutdown(cancel_futures=True)


def _check(task: _Task, pixel_cap: int) -> Item | _Fault:
    path = task.candidate.path
    try:
        image, sha256 = decode(path, pixel_cap=pixel_cap)
        caption = _caption(task.candidate, task.source.missing_caption)
    except DataError as error:
        return _Fault(line=f"{error.where}: {error.what}", skip=task.source.on_bad == "skip")
    if caption is None:  # for missing_caption to decide, whatever on_bad says
        expected = printable(path.with_suffix(".txt").name)
        line = f"{printable(path)}: no caption; expected {expected} beside it"
        return _Fault(line=line, skip=False)
    return Item(
        path=path,
        captions=(caption,),
        width=image.width,
        height=image.height,
        sha256=sha256,
        source=task.index,
    )


def _caption(candidate: Candidate, missing: str) -> str | None:
    """The caption beside an image, where an empty one counts as none, or what stands for it."""
    texts = {text for path in candidate.captions if (text := read_caption(path))}
    if len(texts) > 1:
        names = " and ".join(printable(path.name) for path in candidate.captions)
        raise DataError(f"two different captions, {names}", where=printable(candidate.path))
    if texts:
        return texts.pop()
    if missing == "filename":
        return caption_from_name(candidate.path)
    return "" if missing == "empty" else None


def _duplicates(items: Sequence[Item]) -> list[str]:
    first: dict[str, Path] = {}
    notes = []
    for item in items:
        original = first.setdefault(item.sha256, item.path)
        if original != item.path:
            notes.append(f"the same file twice: {printable(original)} and {printable(item.path)}")
    return notes

"""Folders of images to a checked list of items: everything is read before anything is trained.

Every image is decoded to its last pixel and every caption and mask read, and all that is wrong is
told at once. What was decoded before is hashed only.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from eri.config import DataSource
from eri.data.ahead import ahead
from eri.data.checked import Checks
from eri.data.checking import Checked, Task, check
from eri.data.images import pillow_warnings_ignored
from eri.data.items import Dataset, Fault, Item, Progress, Thing
from eri.data.listing import FOLDER_HINT, ByName, Listing, list_folder, note
from eri.data.tables import Row, read_table
from eri.errors import DataError
from eri.printable import printable

__all__ = ["scan"]

MAX_THREADS = 4  # Pillow lets go of the interpreter while it decodes
AHEAD = 16  # files that a thread may be ahead of the first one that is not done

ORIGINS = {
    ".txt": "from .txt",
    ".caption": "from .caption",
    ".json": "from .json",
    "metadata.jsonl": "from metadata.jsonl",
    "metadata.csv": "from metadata.csv",
    "filename": "from file names",
    "empty": "empty",
}
"""Where captions are from, in the words and the order in which they are counted."""

WORDS: dict[Thing, tuple[str, str]] = {
    "row": ("row of a caption table", "rows of caption tables"),
    "table": ("caption table", "caption tables"),
    "folder": ("folder", "folders"),
}
"""What cannot be used besides images, in the order in which it is counted: one, and several."""


@dataclass(kw_only=True)
class _Report:
    """What is gathered while files are checked."""

    items: list[Item] = field(default_factory=list)
    images: set[Path] = field(default_factory=set)  # all that were found
    fatal: defaultdict[int, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    skipped: defaultdict[int, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    unusable: set[Path] = field(default_factory=set)  # images with a fatal fault
    notes: list[str] = field(default_factory=list)
    origins: defaultdict[int, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    remarks: defaultdict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))

    def add_fault(self, fault: Fault, source: DataSource, index: int) -> bool:
        """Keeps what is wrong, by the source's index; returns whether it stops the run."""
        fatal = not (fault.skippable and source.on_bad == "skip")
        (self.fatal if fatal else self.skipped)[index].append(fault)
        return fatal

    def add_listing(self, listing: Listing, source: DataSource, index: int) -> None:
        self.notes += listing.notes
        self.images.update(candidate.path for candidate in listing.candidates)
        for fault in listing.refused:
            fatal = self.add_fault(fault, source, index)
            if fault.thing == "image":
                self.images.add(fault.path)
                self.unusable.update([fault.path] if fatal else [])

    def add(self, task: Task, checked: Checked) -> None:
        fatal = [self.add_fault(fault, task.source, task.index) for fault in checked.faults]
        if any(fatal):
            self.unusable.add(task.candidate.path)
        for text, path in checked.remarks:
            self.remarks[text].append(path)
        if checked.item is not None:
            self.items.append(checked.item)
            self.origins[task.index][checked.origin] += 1


def scan(sources: Sequence[DataSource], *, progress: Progress | None = None) -> Dataset:
    """Finds, decodes and checks every image of some folders and reads their captions and masks.

    Args:
        sources: folders, each with what to do about missing captions and bad files.
        progress: called as files are checked.

    Raises:
        DataError: a folder is missing or empty, or files cannot be used; lists all of them.
        DiskError: what was found cannot be kept in the cache.
    """
    report = _Report()
    tasks: list[Task] = []
    for index, (source, listing) in enumerate(zip(sources, _list_folders(sources), strict=True)):
        report.add_listing(listing, source, index)
        tasks += _tasks(source, index, listing, report)
    _check(tasks, report, progress)
    notes = _notes(sources, report)
    _refuse(sources, report, notes)
    skipped = tuple(_lines([fault for faults in report.skipped.values() for fault in faults]))
    return Dataset(items=tuple(report.items), skipped=skipped, notes=tuple(notes))


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


def _tasks(source: DataSource, index: int, listing: Listing, report: _Report) -> Iterator[Task]:
    """The images of a folder, each with the rows of the folder's tables that name it."""
    images: ByName[Path] = ByName()
    if listing.tables:
        for candidate in listing.candidates:
            images.add(candidate.path, candidate.path)
    rows: defaultdict[Path, list[Row]] = defaultdict(list)
    strays: list[str] = []
    for table in listing.tables:
        silent = True
        for row in read_table(table):
            if isinstance(row, Fault):
                report.add_fault(row, source, index)
                continue
            silent = silent and not row.texts
            named = images.find(row.image)
            for image in named:
                rows[image].append(row)
            if not named:
                strays.append(f"{row.place} names {row.image.relative_to(table.parent)}")
        if silent:
            report.remarks["tables without a caption"].append(table)
    report.notes += note("rows that name no image of the folder", strays)
    for candidate in listing.candidates:
        beside = tuple(rows.get(candidate.path, ()))
        yield Task(candidate=candidate, rows=beside, source=source, index=index)


def _check(tasks: Sequence[Task], report: _Report, progress: Progress | None) -> None:
    """Checks images, in several threads, and reports them in their order."""
    threads = min(MAX_THREADS, os.cpu_count() or 1)
    with (
        pillow_warnings_ignored(),
        Checks() as checks,
        ahead(partial(check, checks=checks), tasks, threads=threads, depth=threads * AHEAD) as all_,
    ):
        for done, (task, checked) in enumerate(zip(tasks, all_, strict=True), start=1):
            report.add(task, checked)
            if progress is not None:
                progress(done, len(tasks))


def _refuse(sources: Sequence[DataSource], report: _Report, notes: Sequence[str]) -> None:
    """Stops if a file has a fault that may not be skipped, or a source has no item left."""
    used = {item.source for item in report.items}
    emptied = [n for n in range(len(sources)) if n not in used and n not in report.fatal]
    told = [line for n in emptied for line in (_emptied(sources[n]), *_lines(report.skipped[n]))]
    if report.fatal:
        faults = [fault for faults in report.fatal.values() for fault in faults]
        raise DataError(
            _unusable(report, faults),
            where=_where(sources, [*report.fatal, *emptied]),
            hint="mend or remove them, or set on_bad: skip for files that cannot be read and "
            "missing_caption: empty or filename for images without a caption",
            problems=(*_lines(faults), *told, *(f"note: {line}" for line in notes)),
        )
    if emptied:
        raise DataError(
            "no image is left; every one was skipped",
            where=_where(sources, emptied),
            hint="mend the files, or name another folder",
            problems=told if len(emptied) > 1 else told[1:],
        )


def _emptied(source: DataSource) -> str:
    return f"{printable(source.path)}: no image is left; every one was skipped"


def _where(sources: Sequence[DataSource], indices: Sequence[int]) -> str:
    """The folders of some sources, each once."""
    return ", ".join(dict.fromkeys(printable(sources[n].path) for n in sorted(indices)))


def _unusable(report: _Report, faults: Sequence[Fault]) -> str:
    """How many images, rows, tables and folders cannot be used."""
    bad, total = len(report.unusable), len(report.images)
    parts = [f"{bad} of {total} image{'' if total == 1 else 's'}"] if bad else []
    others = Counter(fault.thing for fault in set(faults))
    for thing, (one, several) in WORDS.items():
        count = others[thing]
        parts += [f"{count} {one if count == 1 else several}"] if count else []
    *first, last = parts
    return f"{', '.join(first)}{' and ' if first else ''}{last} cannot be used"


def _lines(faults: Sequence[Fault]) -> list[str]:
    """A line for each fault, by path and line; what two images share is told once."""
    ordered = sorted(set(faults), key=lambda fault: (str(fault.path), fault.line, fault.what))
    return [str(fault) for fault in ordered]


def _notes(sources: Sequence[DataSource], report: _Report) -> list[str]:
    counts = []
    for index, source in enumerate(sources):
        where = f" in {printable(source.path)}" if len(sources) > 1 else ""
        told = ", ".join(_told(report.origins[index]))
        counts += [f"captions{where}: {told}"] if told else []
    copies = [line for text, paths in report.remarks.items() for line in note(text, paths)]
    return [*counts, *report.notes, *copies, *_duplicates(report.items)]


def _told(origins: Counter[str]) -> Iterator[str]:
    """How many captions are from where."""
    for origin, words in ORIGINS.items():
        if origins[origin]:
            yield f"{origins[origin]} {words}"


def _duplicates(items: Sequence[Item]) -> list[str]:
    first: dict[str, Path] = {}
    pairs = []
    for item in items:
        original = first.setdefault(item.sha256, item.path)
        if original != item.path:
            pairs.append(f"{printable(original)} and {printable(item.path)}")
    return note("the same image twice", pairs)

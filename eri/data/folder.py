"""Folders of images to a checked list of items: everything is read before anything is trained.

Every image is decoded to its last pixel and every caption and mask read, and all that is wrong is
told at once. What was decoded before is hashed only.
"""

import os
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from eri.config import DataSource
from eri.data.checked import Checks
from eri.data.checking import Checked, Task, check
from eri.data.images import pillow_warnings_ignored
from eri.data.items import Dataset, Fault, Item, Mask, Progress
from eri.data.listing import FOLDER_HINT, ByName, Listing, list_folder, note
from eri.data.tables import Row, read_table
from eri.errors import DataError
from eri.printable import printable

__all__ = ["Dataset", "Item", "Mask", "Progress", "scan"]

MAX_WORKERS = 4  # threads; Pillow lets go of the interpreter while it decodes
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


@dataclass(kw_only=True)
class _Report:
    """What is gathered while files are checked."""

    items: list[Item] = field(default_factory=list)
    fatal: list[Fault] = field(default_factory=list)
    skipped: list[Fault] = field(default_factory=list)
    refused: int = 0  # images with a fault
    notes: list[str] = field(default_factory=list)
    origins: defaultdict[int, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    remarks: defaultdict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))

    def add_faults(self, faults: Sequence[Fault], source: DataSource) -> None:
        for fault in faults:
            skip = fault.skippable and source.on_bad == "skip"
            (self.skipped if skip else self.fatal).append(fault)

    def add(self, task: Task, checked: Checked) -> None:
        self.add_faults(checked.faults, task.source)
        self.refused += bool(checked.faults)
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
        report.add_faults(listing.refused, source)
        report.refused += len(listing.refused)
        report.notes += listing.notes
        tasks += _tasks(source, index, listing, report)
    for done, (task, checked) in enumerate(zip(tasks, _checked(tasks), strict=True), start=1):
        report.add(task, checked)
        if progress is not None:
            progress(done, len(tasks))
    notes = _notes(sources, report)
    _refuse(sources, report, notes)
    skipped = tuple(_lines(report.skipped))
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
                report.add_faults([row], source)
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


def _checked(tasks: Sequence[Task]) -> Iterator[Checked]:
    """What comes of each task, in their order, checked by several threads."""
    workers = min(MAX_WORKERS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="check")
    with pillow_warnings_ignored(), Checks() as checks:
        try:
            yield from _in_turn(pool, tasks, checks, workers * AHEAD)
        finally:
            pool.shutdown(cancel_futures=True)


def _in_turn(
    pool: ThreadPoolExecutor, tasks: Sequence[Task], checks: Checks, ahead: int
) -> Iterator[Checked]:
    waiting: deque[Future[Checked]] = deque()
    for task in tasks:
        waiting.append(pool.submit(check, task, checks))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _refuse(sources: Sequence[DataSource], report: _Report, notes: Sequence[str]) -> None:
    """Stops if a file has a fault that may not be skipped, or a source has no item left."""
    if report.fatal:
        count = report.refused + len(report.items)
        what = f"{report.refused} of {count} images cannot be used"
        if not report.refused:
            what = f"{len(report.fatal)} rows of caption tables cannot be used"
        raise DataError(
            what,
            where=", ".join(printable(source.path) for source in sources),
            hint="mend or remove them, or set on_bad: skip for files that cannot be read and "
            "missing_caption: empty or filename for images without a caption",
            problems=(*_lines(report.fatal), *(f"note: {line}" for line in notes)),
        )
    used = {item.source for item in report.items}
    for index, source in enumerate(sources):
        if index not in used:
            raise DataError(
                "no image is left; every one was skipped",
                where=printable(source.path),
                hint="mend the files, or name another folder",
                problems=_lines(report.skipped),
            )


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

"""One image with what lies beside it to an item, or to all that is wrong with it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from eri.config import DataSource
from eri.data.captions import Written, caption_from_name, read_caption
from eri.data.checked import Checks, Finding, Seen, look
from eri.data.images import HashedFile, decode_open
from eri.data.items import Fault, Item, Mask
from eri.data.listing import Candidate
from eri.data.masks import check_mask
from eri.data.tables import Row
from eri.errors import DataError
from eri.printable import printable

__all__ = ["Checked", "Task", "check"]

MEGAPIXEL = 1_000_000
TINY = 64  # pixels; a side of eight in the latent


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """An image to check.

    Args:
        candidate: its file and those beside it.
        rows: the rows of tables that name it.
        source: where it is from; says what to do about what is missing.
        index: of the source.
    """

    candidate: Candidate
    rows: tuple[Row, ...]
    source: DataSource
    index: int


@dataclass(kw_only=True, slots=True)
class Checked:
    """What came of an image.

    Args:
        item: None where there are faults.
        origin: where its caption is from: the ending or the name of a file, or what stands for it.
        faults: all that is wrong.
        remarks: what is worth a note: a file, by what there is to say of it.
    """

    item: Item | None = None
    origin: str = ""
    faults: list[Fault] = field(default_factory=list)
    remarks: list[tuple[str, Path]] = field(default_factory=list)


class _Place(NamedTuple):
    """What one place says of an image: its file, the name to show, its kind, its texts."""

    path: Path
    name: str
    origin: str
    written: Written


class _Captions(NamedTuple):
    texts: tuple[str, ...]
    origin: str


def check(task: Task, checks: Checks) -> Checked:
    """Reads an image, its captions and its mask.

    Args:
        task: what to read.
        checks: what was found before, and is added to.

    Raises:
        DiskError: what is found cannot be kept.
    """
    result = Checked()
    places = _places(task, result)
    seen = _seen(task, checks, result)
    mask = _mask(task, seen, checks, result) if seen is not None else None
    captions = _captions(task, places, seen, result)
    if seen is None or captions is None or result.faults:
        return result
    finding = seen.finding
    result.origin = captions.origin
    result.item = Item(
        path=task.candidate.path,
        captions=captions.texts,
        width=finding.width,
        height=finding.height,
        sha256=seen.sha256,
        source=task.index,
        background=task.source.background if finding.transparent else None,
        mask=mask,
    )
    _remark(task, finding, result)
    return result


def _seen(task: Task, checks: Checks, result: Checked) -> Seen | None:
    path, cap = task.candidate.path, task.source.max_megapixels * MEGAPIXEL

    def find(file: HashedFile) -> Finding:
        decoded = decode_open(file, pixel_cap=cap)
        size = decoded.image.size
        return Finding(*size, decoded.frames, decoded.transparent, decoded.invisible)

    try:
        return look(path, checks, "image", pixel_cap=cap, find=find)
    except DataError as error:
        result.faults.append(Fault(path, error.what))
        return None


def _mask(task: Task, seen: Seen, checks: Checks, result: Checked) -> Mask | None:
    path, masks, wanted = task.candidate.path, task.candidate.masks, task.source.mask
    finding = seen.finding
    if wanted != "file":
        unused = f"mask files are here and mask: is {wanted}, so they are not used"
        result.remarks += [(unused, mask) for mask in masks]
    if wanted == "alpha" and finding.blank:
        what = "all of it is transparent, so nothing would be learned; remove it, or set mask: none"
        result.faults.append(Fault(path, what))
    elif wanted == "alpha" and finding.transparent:
        return Mask(path=path, sha256=seen.sha256, alpha=True)
    elif wanted == "alpha":
        result.remarks.append(("images without transparency, learned whole", path))
    elif wanted == "file" and len(masks) > 1:
        names = " and ".join(printable(mask.name) for mask in masks)
        result.faults.append(Fault(path, f"two masks, {names}; keep one"))
    elif wanted == "file" and masks:
        return _mask_file(task, finding, checks, result)
    elif wanted == "file":
        result.remarks.append(("images without a mask, learned whole", path))
    return None


def _mask_file(task: Task, finding: Finding, checks: Checks, result: Checked) -> Mask | None:
    (path,) = task.candidate.masks
    size, cap = (finding.width, finding.height), task.source.max_megapixels * MEGAPIXEL
    try:
        return check_mask(path, size, checks, pixel_cap=cap)
    except DataError as error:
        result.faults.append(Fault(path, error.what))
        return None


def _places(task: Task, result: Checked) -> list[_Place] | None:
    """All the places that may say something of the image; None if one of them cannot be read."""
    places, faults = [], []
    for path in task.candidate.captions:
        try:
            written = read_caption(path)
            places.append(_Place(path, printable(path.name), path.suffix.lower(), written))
        except DataError as error:
            faults.append(Fault(path, error.what))
    for row in task.rows:
        origin, written = row.table.name, Written(row.texts, "has no text")
        places.append(_Place(row.table, f"{origin}:{row.line}", origin, written))
    result.faults += faults
    return None if faults else places


def _captions(
    task: Task, places: list[_Place] | None, seen: Seen | None, result: Checked
) -> _Captions | None:
    """The captions of an image, where an empty one counts as none, or what stands for them."""
    if places is None:
        return None
    path = task.candidate.path
    speaking = [place for place in places if place.written.texts]
    if len({place.written.texts for place in speaking}) > 1:
        names = ", ".join(place.name for place in speaking)
        result.faults.append(Fault(path, f"different captions in {names}; keep one"))
        return None
    if speaking:
        result.remarks += [
            ("JSON files without a caption, not used", place.path)
            for place in places
            if place.origin == ".json" and not place.written.texts
        ]
        return _Captions(speaking[0].written.texts, speaking[0].origin)
    if seen is None:  # what cannot be read needs no caption
        return None
    return _instead(task, places, result)


def _instead(task: Task, places: list[_Place], result: Checked) -> _Captions | None:
    """What stands for the caption of an image that has none; `on_bad` has no say in it."""
    path, missing = task.candidate.path, task.source.missing_caption
    if missing == "empty":
        return _Captions(("",), "empty")
    if missing == "filename":
        try:
            return _Captions((caption_from_name(path),), "filename")
        except DataError as error:
            result.faults.append(Fault(path, error.what))
            return None
    why = "; ".join(f"{place.name} {place.written.silence}" for place in places)
    beside = printable(path.with_suffix(".txt").name)
    what = f"no caption{f' ({why})' if why else ''}; write {beside} beside it"
    result.faults.append(Fault(path, what, skippable=False))
    return None


def _remark(task: Task, finding: Finding, result: Checked) -> None:
    """What is worth a note of an image that is used."""
    remarks = {
        "animations or files of several pages, the first of which is used": finding.frames > 1,
        f"transparent images, laid on {task.source.background}": finding.transparent,
        "images of which nothing is visible": finding.blank,
        f"images with a side of less than {TINY} pixels": min(finding[:2]) < TINY,
    }
    result.remarks += [(text, task.candidate.path) for text, holds in remarks.items() if holds]

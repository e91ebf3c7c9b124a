"""The images of a run, checked before anything slow happens."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import lcm

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from eri.config import Config, DataSource
from eri.data import (
    Item,
    Progress,
    assign,
    decode,
    has_unset_trigger,
    note,
    scan,
)
from eri.errors import DataError
from eri.printable import printable
from eri.run.base import BaseFacts
from eri.run.image_set import ImageSet
from eri.run.lengths import length_notes, windows_needed
from eri.train import say

__all__ = ["Images", "look_at_images", "told"]

EXAMPLES = 4  # training images on the contact sheet
MULTIPLE = 64  # pixels of a side, though a net may do with less: there are fewer shapes then
AS_IT_IS = {"flip": False, "crop_jitter": 0.0, "color": 0.0, "repeats": 1, "validation": None}
"""What a folder asks for that is measured on."""


@dataclass(frozen=True)
class Images:
    """What a run trains on, and what it is measured on."""

    train: ImageSet
    validation: ImageSet

    def examples(self, side: int) -> list[Image.Image]:
        """A few of the training images, spread evenly, scaled to fit a square of some pixels."""
        items = [self.train.items[n] for n in self.train.learned]
        count = min(EXAMPLES, len(items))
        pictures = [_picture(items[n * len(items) // count]) for n in range(count)]
        for picture in pictures:
            picture.thumbnail((side, side))
        return pictures


def _picture(item: Item) -> Image.Image:
    cap = item.width * item.height
    return decode(item.path, pixel_cap=cap, background=item.background).image


def look_at_images(
    config: Config, facts: BaseFacts, console: Console, check_stop: Callable[[], None]
) -> Images:
    """Find, decode and check every image and caption, and say what their owner may want to know.

    Raises:
        DataError: something is missing or cannot be used; lists all of it.
    """
    held_out = [
        source.model_copy(update={"path": source.validation, **AS_IT_IS})
        for source in config.data
        if source.validation is not None
    ]
    with told(console, "checking images", check_stop) as progress:
        dataset = scan((*config.data, *held_out), progress=progress)  # all that is wrong at once
    for line in (*dataset.skipped, *dataset.notes):
        say(console, f"note: {line}")
    first = len(config.data)
    measured = [
        replace(item, source=item.source - first) for item in dataset.items if item.source >= first
    ]
    items = _not_held_out(
        [item for item in dataset.items if item.source < first], measured, config.data, console
    )
    train = _image_set(items, config.data, config.train.batch_size, facts, console)
    validation = _image_set(measured, held_out, 1, facts, console) if held_out else ImageSet()
    return Images(train, validation)


def _not_held_out(
    items: Sequence[Item], measured: Sequence[Item], sources: Sequence[DataSource], console: Console
) -> list[Item]:
    """The items to train on: a validation folder may lie in the folder that it is held out of.

    Raises:
        DataError: nothing of a folder is left.
    """
    held_out = {os.path.realpath(item.path) for item in measured}
    kept, dropped, twice = [], [], []
    seen: dict[str, int] = {}
    for item in items:
        place = os.path.realpath(item.path)
        if place in held_out:
            dropped.append(item.path)
            continue
        if seen.setdefault(place, item.source) != item.source:
            twice.append(item.path)
        kept.append(item)
    emptied = {item.source for item in items} - {item.source for item in kept}
    if emptied:
        raise DataError(
            "every image of this folder is in a validation folder, which is not trained on",
            where=printable(sources[min(emptied)].path),
            hint="name another folder for validation, or none",
        )
    for line in (
        *note("held out for validation, so not trained on", dropped),
        *note("in two folders of data, so trained on as often as both say", twice),
    ):
        say(console, f"note: {line}")
    return kept


def _image_set(
    items: Sequence[Item],
    sources: Sequence[DataSource],
    batch_size: int,
    facts: BaseFacts,
    console: Console,
) -> ImageSet:
    resolutions = [
        facts.resolution if source.resolution == "auto" else source.resolution for source in sources
    ]
    assignment = assign(
        items, sources, resolutions, step=lcm(MULTIPLE, facts.step), batch_size=batch_size
    )
    unset = [
        item.path
        for item in items
        if not sources[item.source].regularization  # it is taken out of these
        and has_unset_trigger(item.captions, sources[item.source].caption)
    ]
    triggers = note("captions with [trigger], which stays text without caption.trigger", unset)
    images = ImageSet(
        tuple(items), assignment.shapes, tuple(sources), max(resolutions), assignment.joined
    )
    images = replace(images, windows=windows_needed(images, facts.words))
    still = note("crop_jitter moves nothing in images as small as their shape", images.unmoved)
    lengths = length_notes(images, facts.words)
    for line in (*triggers, *assignment.notes, *still, *lengths):
        say(console, f"note: {line}")
    return images


@contextmanager
def told(console: Console, what: str, check_stop: Callable[[], None]) -> Iterator[Progress]:
    """A progress bar for some work; yields the function that the work reports to."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    hidden = not console.is_terminal
    with Bar(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden
    ) as bar:
        task = bar.add_task(what, total=None)

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            check_stop()

        yield report

"""The images of a run: checked before anything slow, then encoded once with their captions."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image
from rich.console import Console
from rich.progress import Progress as Bar

from eri.config import Config, DataSource
from eri.data import Item, Latents, Progress, Shape, assign, cache_latents, decode, scan
from eri.models.text import TextEncoder
from eri.printable import printable
from eri.run.base import Base, BaseFacts
from eri.run.conditions import Condition, encode, size_tensor
from eri.run.objective import Sample
from eri.train import say

__all__ = ["Encoder", "ImageSet", "Images", "Samples", "look_at_images"]

PROMPTS_AT_ONCE = 16
EXAMPLES = 4  # training images on the contact sheet


@dataclass(frozen=True)
class ImageSet:
    """Checked images, and the shape that each is cut to."""

    items: tuple[Item, ...] = ()
    shapes: tuple[Shape, ...] = ()
    fingerprint: str = ""  # of their bytes and captions in their order
    resolution: int = 0  # side of the largest square whose area they are scaled to

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class Images:
    """What a run trains on, and what it is measured on."""

    train: ImageSet
    validation: ImageSet

    def examples(self) -> list[Image.Image]:
        """A few of the training images, spread evenly."""
        items = self.train.items
        count = min(EXAMPLES, len(items))
        return [decode(items[n * len(items) // count].path).image for n in range(count)]


def look_at_images(
    config: Config, facts: BaseFacts, console: Console, check_stop: Callable[[], None]
) -> Images:
    """Find, decode and check every image and caption, and say what their owner may want to know.

    Raises:
        DataError: something is missing or cannot be used; lists all of it.
    """
    held_out = [
        source.model_copy(update={"path": source.validation, "validation": None})
        for source in config.data
        if source.validation is not None
    ]
    train = _look(config.data, facts, console, check_stop)
    validation = _look(held_out, facts, console, check_stop) if held_out else ImageSet()
    return Images(train, validation)


def _look(
    sources: Sequence[DataSource],
    facts: BaseFacts,
    console: Console,
    check_stop: Callable[[], None],
) -> ImageSet:
    with told(console, "checking images", check_stop) as progress:
        dataset = scan(sources, progress=progress)
    resolutions = [
        facts.resolution if source.resolution == "auto" else source.resolution for source in sources
    ]
    assignment = assign(dataset.items, resolutions, facts.step)
    for line in (*dataset.skipped, *dataset.notes, *assignment.notes):
        say(console, f"note: {line}")
    return ImageSet(dataset.items, assignment.shapes, dataset.fingerprint, max(resolutions))


class Samples(Sequence[Sample]):
    """Encoded images with the conditions of their captions; latents are read when asked for.

    Args:
        images: checked ones.
        latents: theirs, in the same order.
        conditions: of each caption.
        windows: in which every caption was read.
    """

    def __init__(
        self,
        images: ImageSet,
        latents: Latents,
        conditions: dict[str, Condition],
        windows: int,
    ) -> None:
        self.images = images
        self.latents = latents
        self.conditions = conditions
        self.windows = windows

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # no slices
        item, latent = self.images.items[index], self.latents[index]
        condition = self.conditions[item.captions[0]]
        sizes = size_tensor(item.width, item.height, self.images.shapes[index])
        return Sample(
            file=printable(item.path),
            mean=latent.mean,
            std=latent.std,
            context=condition.context,
            pooled=condition.pooled,
            time_ids=None if condition.pooled is None else sizes,
        )


class Encoder:
    """Encodes images and prompts with a base model, and tells how far it is."""

    def __init__(self, console: Console, check_stop: Callable[[], None]) -> None:
        self.console = console
        self.check_stop = check_stop

    def samples(self, base: Base, images: ImageSet, windows: int = 1) -> Samples:
        """Encode images, from the cache where they are there, and their captions.

        Args:
            base: whose VAE and text encoder do it.
            images: checked ones.
            windows: of the text encoder, in which the captions are read; more if they need more.
        """
        captions = list(dict.fromkeys(item.captions[0] for item in images.items))
        needed = base.text.windows_needed(captions) if captions else 1
        more, windows = needed > windows, max(needed, windows)
        conditions = self._conditions(base.text, captions, windows)
        if more:
            self._tell_the_longest(base.text, images, conditions, windows)
        self._tell_what_is_cut(base.text, images, windows)
        with told(self.console, "encoding images", self.check_stop) as progress:
            latents = cache_latents(
                images.items,
                images.shapes,
                base.vae.encode,
                encoder=f"{base.facts.hashes['vae']} fp32 {base.vae.model.device.type}",
                progress=progress,
            )
        return Samples(images, latents, conditions, windows)

    def _conditions(
        self, text: TextEncoder, captions: Sequence[str], windows: int
    ) -> dict[str, Condition]:
        conditions: list[Condition] = []
        for start in range(0, len(captions), PROMPTS_AT_ONCE):
            conditions += encode(text, captions[start : start + PROMPTS_AT_ONCE], windows)
            self.check_stop()
        return dict(zip(captions, conditions, strict=True))

    def _tell_the_longest(
        self,
        text: TextEncoder,
        images: ImageSet,
        conditions: dict[str, Condition],
        windows: int,
    ) -> None:
        """Why captions are read in several windows, and how long they become."""
        longest = max(images.items, key=lambda item: text.tokens_lost(item.captions[0]))
        tokens = text.tokens - 2 + text.tokens_lost(longest.caption)  # more than one window holds
        states = len(conditions[longest.caption].context)
        say(
            self.console,
            f"note: the longest caption has {tokens} tokens ({printable(longest.path)}); "
            f"captions are encoded in {windows} windows of {text.tokens}, {states} states each",
        )

    def _tell_what_is_cut(self, text: TextEncoder, images: ImageSet, windows: int) -> None:
        for item in images.items:
            lost = text.tokens_lost(item.captions[0], windows=windows)
            if lost:
                say(
                    self.console,
                    f"note: {printable(item.path)}: the caption has {lost} tokens more than the "
                    f"{windows * (text.tokens - 2)} that the model reads; its end is cut off",
                )


@contextmanager
def told(console: Console, what: str, check_stop: Callable[[], None]) -> Iterator[Progress]:
    """A progress bar for some work; yields the function that the work reports to."""
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            check_stop()

        yield report

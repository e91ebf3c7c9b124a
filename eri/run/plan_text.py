"""The lines of the plan: what a run will do and take, with the arithmetic behind each number."""

from collections.abc import Sequence
from fractions import Fraction
from math import ceil

from eri.config import Config, Train
from eri.data import Batches, Shape
from eri.data.batches import Bucket
from eri.data.shapes import crop_loss
from eri.run.base import BaseFacts
from eri.run.cache_space import CacheSpace
from eri.run.dataset import Images
from eri.run.image_set import ImageSet
from eri.run.memory_plan import LEAST, MemoryPlan, shown_size
from eri.run.rates import Rate
from eri.run.steps import FEWEST_STEPS, MOST_STEPS, VIEWS_OF_AN_IMAGE, auto_steps

__all__ = [
    "cache_lines",
    "image_lines",
    "memory_lines",
    "model_lines",
    "slower_lines",
    "time_line",
    "training_lines",
]

MOST_ROWS = 9  # of the table of shapes; the whole plan shall be read at a glance
INDENT = " " * 9
TABLE = "{:<10} {:>7} {:>9} {:>8}   {}"


def model_lines(config: Config, facts: BaseFacts) -> list[str]:
    """The base model and the adapter."""
    adapter = config.adapter
    millions = sum(facts.parts.parameters.values()) / 1e6
    return [
        f"model    {facts.name}: {facts.spec.family}, {millions:.1f} M parameters, "
        f"{adapter.targets} at rank {adapter.rank}, alpha {adapter.alpha:g}",
        *(f"{INDENT}{note}" for note in (*facts.notes, facts.words.states.note) if note),
        f"vae      {facts.vae_path.name}, SHA-256 {facts.weights['vae'][:16]}",
    ]


def image_lines(images: Images, batches: Batches) -> list[str]:
    """The images, and a table of their shapes: those of most samples first."""
    train = images.train
    regularizing = sum(train.source(index).regularization for index in range(len(train)))
    parts = [
        f"{len(train)}",
        *([f"{regularizing} of them for regularization"] if regularizing else []),
        *([f"{train.joined} joined the shape of their neighbours"] if train.joined else []),
        f"{len(images.validation)} held out",
    ]
    buckets = sorted(batches.buckets.items(), key=lambda pair: (-pair[1].samples, pair[0]))
    rows = [_row(train, shape, bucket) for shape, bucket in buckets[:MOST_ROWS]]
    others = [bucket for _, bucket in buckets[MOST_ROWS:]]
    if others:
        count = sum(len(bucket.repeats) for bucket in others)
        rows.append(f"and {len(others)} more shapes, of {count} images")
    header = TABLE.format("shape", "images", "an epoch", "batches", "cut off: mean, worst")
    return [f"images   {', '.join(parts)}", *(f"{INDENT}{line}" for line in (header, *rows))]


def _row(images: ImageSet, shape: Shape, bucket: Bucket) -> str:
    """One shape: images, samples and batches an epoch, share of the images that is cut off."""
    items = [images.items[index] for index in bucket.repeats]
    losses = [float(crop_loss(item.width, item.height, shape)) for item in items]
    return TABLE.format(
        f"{shape.width}x{shape.height}",
        len(items),
        bucket.samples,
        _number(bucket.batches_per_epoch),
        f"{sum(losses) / len(losses):.1%}, {max(losses):.1%}",
    )


def training_lines(train: Train, batches: Batches, steps: int, learned: Sequence[int]) -> list[str]:
    """How long a run trains, and why so long.

    Args:
        train: the settings.
        batches: of the run.
        steps: of the run.
        learned: the images that count in `steps: auto`.
    """
    seen = train.batch_size * train.accumulate
    warmup = f", after a warm-up of {train.warmup} steps" if train.warmup else ""
    if train.warmup >= steps:
        warmup = f", never reached: the warm-up is {train.warmup} steps long"
    rate = f"lr {train.lr:g} {train.schedule}{warmup}"
    if train.epochs is not None:
        plural = "" if train.epochs == 1 else "s"
        samples = train.epochs * batches.samples_per_epoch
        packed = f" of up to {train.accumulate} batches" if train.accumulate > 1 else ""
        return [
            f"training {steps} steps of up to {seen} images, {rate}",
            f"{INDENT}{train.epochs} epoch{plural} x {batches.samples_per_epoch} samples = "
            f"{samples} samples: {batches.total} batches of up to {train.batch_size} "
            f"-> {steps} steps{packed}",
        ]
    epochs = float(steps * train.accumulate / batches.batches_per_epoch)
    lines = [
        f"training {steps} steps of up to {seen} images, {epochs:.1f} epochs of "
        f"{batches.samples_per_epoch} samples, {rate}"
    ]
    if train.steps == "auto":
        auto = auto_steps(train, batches, learned)
        of_them = "" if auto.of_a_step == seen else " of them"
        lines += [
            f"{INDENT}auto: {auto.images} images x {VIEWS_OF_AN_IMAGE} views / "
            f"{_number(auto.of_a_step)}{of_them} a step = {auto.wanted}, "
            f"at least {FEWEST_STEPS} and at most {MOST_STEPS};",
            f"{INDENT}guides and presets of other trainers take 1000 to 3000",
        ]
    return lines


def memory_lines(plan: MemoryPlan, images: int, shape: Shape) -> list[str]:
    """How the largest batch is run, what that takes, and a warning where it may not fit.

    Args:
        plan: with its memory worked out.
        images: in that batch.
        shape: of them.
    """
    if plan.needed is None:
        return []
    needed = plan.needed
    way = f"{images} image{'' if images == 1 else 's'} of {shape.width}x{shape.height}"
    way += _parts(images, plan.micro)
    if plan.recompute != "nothing":
        way += f", {plan.recompute} computed again"
    if plan.free is None or plan.peak is None:
        taken = f"{shown_size(needed.total)} beside the program itself"
    else:
        taken = f"{shown_size(plan.peak)} of {shown_size(plan.free)} free"
    part = "a part" if images > plan.micro else "these"
    lines = [
        f"memory   about {taken}: {way}",
        f"{INDENT}{shown_size(needed.weights)} for the U-Net, {shown_size(needed.adapter)} for the "
        f"adapter, {shown_size(needed.activations)} for {part}",
    ]
    if plan.fits:
        return lines
    advice = "a smaller data.resolution or adapter.rank takes less"
    if (plan.micro, plan.recompute) != LEAST:
        advice = "train.memory: auto finds a way that fits, if there is one"
    return [*lines, f"warning: this is more than is free and may fail; {advice}"]


def _parts(images: int, micro: int) -> str:
    """How a batch is divided."""
    if images <= micro:
        return " at once" if images > 1 else ""
    if images % micro == 0:
        return f" as {images // micro} x {micro}"
    return f" in {ceil(images / micro)} parts of at most {micro}"


def slower_lines(reasons: Sequence[str]) -> list[str]:
    """What keeps a run from the fastest way to train."""
    return [f"slower   {reason}" for reason in reasons]


def time_line(samples: int, rate: Rate | None) -> str:
    """How long the steps take, if runs like this one were timed here."""
    if rate is None:
        return "time     is known after the first steps"
    return (
        f"time     about {_duration(samples / rate.images_per_second)} at "
        f"{rate.images_per_second:.3g} images/s (measured here on {rate.measured}), "
        "previews left out"
    )


def cache_lines(space: CacheSpace) -> list[str]:
    """What the cache lacks of the run, and a warning where the disk has no room for it."""
    if not space.needed:
        return [f"cache    all {space.latents} latents and their texts are there"]
    texts = f" and at most {space.texts} texts" if space.texts else ""
    told = (
        f"cache    {space.missing} of {space.latents} latents{texts} are missing: "
        f"{shown_size(space.needed)} more"
    )
    if space.needed > space.free:
        return [told, f"warning: only {shown_size(space.free)} are free for the cache"]
    return [f"{told} of {shown_size(space.free)} free"]


def _number(value: Fraction) -> str:
    return f"{float(value):.4g}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{max(round(seconds), 1)} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"

"""The shapes that images are trained in, and which of them each image takes.

Images of one shape make a batch, so there are few shapes: sides are multiples of what the model
needs, the area is at most that of the resolution's square, and no side is longer than twice the
other. An image takes the shape of its own aspect; one that is too small for it takes one of a
smaller square, each 7/8 of the one before, rather than being enlarged. Images that are too few for
a batch join their neighbours' shape where that cuts off little. All of it is integer arithmetic,
the same on every machine.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from eri.config import DataSource
from eri.data.items import Item
from eri.data.listing import note
from eri.errors import ConfigError

__all__ = ["Assignment", "Shape", "assign", "covering", "crop_loss", "shapes"]

MAX_ASPECT = 2
MAX_LOSS = Fraction(5, 100)  # of an image's area, that joining its neighbours may cut off more
LEAST_AREA = Fraction(8, 10)  # of its own shape's, that the neighbours' has


class Shape(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int

    @property
    def area(self) -> int:
        """Pixels."""
        return self.height * self.width


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """The shape of every item.

    Args:
        shapes: in the order of the items.
        joined: how many took the shape of their neighbours.
        notes: on images that are smaller than the resolution.
    """

    shapes: tuple[Shape, ...]
    joined: int
    notes: tuple[str, ...]


@lru_cache
def shapes(resolution: int, step: int) -> tuple[Shape, ...]:
    """The shapes for a resolution, the square first, then from the least to the most oblong.

    Args:
        resolution: side in pixels of the square whose area no shape exceeds; at least `step`.
        step: what every side is a multiple of.
    """
    largest: dict[Fraction, Shape] = {}
    for short in range(step, resolution + 1, step):
        long = min(resolution * resolution // short, MAX_ASPECT * short) // step * step
        if long >= short:
            largest[Fraction(long, short)] = Shape(short, long)  # a later one is larger
    if not largest:
        raise ValueError(f"resolution {resolution} is smaller than {step}, the least side")
    oblong = [largest[ratio] for ratio in sorted(largest) if ratio > 1]
    square = resolution // step * step
    turned = [turn for shape in oblong for turn in (shape, Shape(shape.width, shape.height))]
    return (Shape(square, square), *turned)


def covering(width: int, height: int, shape: Shape) -> Shape:
    """The size of an image once it is scaled to cover a shape without a gap."""
    if width * shape.height >= shape.width * height:
        scaled_width = (2 * width * shape.height + height) // (2 * height)
        return Shape(shape.height, max(shape.width, scaled_width))
    scaled_height = (2 * height * shape.width + width) // (2 * width)
    return Shape(max(shape.height, scaled_height), shape.width)


def crop_loss(width: int, height: int, shape: Shape) -> Fraction:
    """The share of an image's area that is cut off when it is cut to a shape."""
    return 1 - Fraction(shape.area, covering(width, height, shape).area)


def assign(
    items: Sequence[Item],
    sources: Sequence[DataSource],
    resolutions: Sequence[int],
    *,
    step: int,
    batch_size: int = 1,
) -> Assignment:
    """Chooses the shape of every item.

    Args:
        items: checked images.
        sources: whose repeats and `upscale` hold for their items.
        resolutions: for each source, the side of the square that gives the area.
        step: what every side is a multiple of.
        batch_size: images in a batch; shapes with fewer may be joined to others.

    Raises:
        ConfigError: a resolution that no shape has.
    """
    for resolution in resolutions:
        if resolution < step:
            what = f"the resolution is {resolution} pixels, and the model needs {step} at least"
            raise ConfigError(what, where="data.resolution")
    own = [
        _choose(item, resolutions[item.source], step, upscale=sources[item.source].upscale)
        for item in items
    ]
    members = [
        _Member(item, shape, resolutions[item.source] ** 2, sources[item.source].repeats)
        for item, shape in zip(items, own, strict=True)
    ]
    chosen = _joined(members, batch_size)
    small, enlarged = [], []
    for item, shape in zip(items, own, strict=True):
        if not _holds(item, shape):
            enlarged.append(item.path)
        elif shape != _nearest(item, shapes(resolutions[item.source], step)):
            small.append(item.path)
    return Assignment(
        shapes=tuple(chosen),
        joined=sum(a != b for a, b in zip(own, chosen, strict=True)),
        notes=(
            *note("images smaller than the resolution, not enlarged", small),
            *note("images enlarged", enlarged),
        ),
    )


def _choose(item: Item, resolution: int, step: int, *, upscale: bool) -> Shape:
    """The shape of the largest square, up to the wanted one, that the image can fill."""
    if upscale:
        return _nearest(item, shapes(resolution, step))
    for side in _sides(resolution, step):
        shape = _nearest(item, shapes(side, step))
        if _holds(item, shape):
            return shape
    return _nearest(item, shapes(step, step))


def _sides(resolution: int, step: int) -> Iterator[int]:
    side = resolution
    while side >= step:
        yield side
        side = min(side * 7 // 8, side - 1) // step * step


def _holds(item: Item, shape: Shape) -> bool:
    """Whether the image fills the shape without being enlarged."""
    return shape.width <= item.width and shape.height <= item.height


def _nearest(item: Item, candidates: Sequence[Shape]) -> Shape:
    """The shape whose aspect is nearest by the ratio of the two; the first of equally near ones."""

    def distance(shape: Shape) -> Fraction:
        ratio = Fraction(item.width * shape.height, item.height * shape.width)
        return max(ratio, 1 / ratio)

    return min(candidates, key=distance)


class _Member(NamedTuple):
    """An image that may join its neighbours."""

    item: Item
    own: Shape  # that it would take alone
    most: int  # pixels of a shape, as its resolution says
    repeats: int

    def joins(self, shape: Shape) -> bool:
        """Whether it may take a shape: of little less area, and cutting little more off it."""
        width, height = self.item.width, self.item.height
        more = crop_loss(width, height, shape) - crop_loss(width, height, self.own)
        return (
            LEAST_AREA * self.own.area <= shape.area <= self.most
            and more <= MAX_LOSS
            and _holds(self.item, shape)
        )


def _joined(members: Sequence[_Member], batch_size: int) -> list[Shape]:
    """The shapes after those that do not hold a batch joined others, the smallest first."""
    buckets: defaultdict[Shape, list[int]] = defaultdict(list)
    for index, member in enumerate(members):
        buckets[member.own].append(index)

    def showings(shape: Shape) -> int:
        return sum(members[index].repeats for index in buckets[shape])

    for shape in sorted(buckets, key=lambda shape: (showings(shape), shape)):
        few = [members[index] for index in buckets[shape]]
        if showings(shape) >= batch_size * max(member.repeats for member in few):
            continue
        neighbour = _neighbour(few, [other for other in buckets if other != shape])
        if neighbour is not None:
            buckets[neighbour] += buckets.pop(shape)
    chosen = {index: shape for shape, indices in buckets.items() for index in indices}
    return [chosen[index] for index in range(len(members))]


def _neighbour(few: Sequence[_Member], others: Sequence[Shape]) -> Shape | None:
    """The shape in use that all of these images may take and that cuts least off them."""

    def loss(other: Shape) -> Fraction:
        return max(crop_loss(one.item.width, one.item.height, other) for one in few)

    fitting = [other for other in others if all(one.joins(other) for one in few)]
    return min(fitting, key=lambda other: (loss(other), other), default=None)

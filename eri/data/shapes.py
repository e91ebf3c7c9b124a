"""The shapes that images are trained in, and which of them each image takes.

Images of one shape make a batch, so there are few shapes: sides are multiples of what the model
needs, the area is at most that of the resolution's square, and no side is longer than twice the
other. An image takes the shape of its own aspect; one that is too small for it takes a smaller one
rather than being enlarged. All of it is integer arithmetic, the same on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from eri.data.folder import Item
from eri.data.listing import note

__all__ = [
    "Assignment",
    "Shape",
    "assign",
    "shapes",
]

MAX_ASPECT = 2


class Shape(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """The shape of every item, and a note on those that are smaller than the resolution."""

    shapes: tuple[Shape, ...]
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


def assign(items: Sequence[Item], resolutions: Sequence[int], step: int) -> Assignment:
    """Chooses the shape of every item.

    Args:
        items: checked images.
        resolutions: for each source, the side of the square that gives the area.
        step: what every side is a multiple of.
    """
    chosen = [_choose(item, resolutions[item.source], step) for item in items]
    small: list[Path] = []
    enlarged: list[Path] = []
    for item, shape in zip(items, chosen, strict=True):
        if shape.width > item.width or shape.height > item.height:
            enlarged.append(item.path)
        elif shape != _nearest(item, shapes(resolutions[item.source], step)):
            small.append(item.path)
    return Assignment(
        shapes=tuple(chosen),
        notes=(
            *note("images smaller than the resolution, kept at their size", small),
            *note("images smaller than the smallest shape, enlarged", enlarged),
        ),
    )


def _choose(item: Item, resolution: int, step: int) -> Shape:
    """The shape of the largest resolution, up to the wanted one, that the image can fill."""
    for side in (resolution, *range((resolution - 1) // step * step, 0, -step)):
        shape = _nearest(item, shapes(side, step))
        if shape.width <= item.width and shape.height <= item.height:
            return shape
    return _nearest(item, shapes(step, step))


def _nearest(item: Item, candidates: Sequence[Shape]) -> Shape:
    """The shape whose aspect is nearest by the ratio of the two; the first of equally near ones."""

    def distance(shape: Shape) -> Fraction:
        ratio = Fraction(item.width * shape.height, item.height * shape.width)
        return max(ratio, 1 / ratio)

    return min(candidates, key=distance)

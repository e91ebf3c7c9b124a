"""How an image is cut to a shape, and the versions of one image that augmentation makes.

A version of an image, a `View`, is a handful of whole numbers drawn from the image's own hash, so
it is the same in every run and its latent can be kept. The geometry of a cut is integer arithmetic,
and what SDXL is told of it comes from the same numbers as the pixels.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from eri.config import DataSource
from eri.data.items import Item
from eri.data.shapes import Shape, covering
from eri.rng import generator

__all__ = ["PLAIN", "UNIT", "Cut", "Geometry", "View", "fit", "geometry", "size_ids", "views"]

UNIT = 1024
"""What a whole is in the numbers of a view."""


class View(NamedTuple):
    """One version of an image, in parts of `UNIT`.

    Args:
        flip: mirrored, left and right, after the cut.
        zoom: how much larger than needed the image is scaled before the cut; it never makes an
            image larger than it is.
        down: where the cut lies in the room there is, from the top.
        across: the same from the left.
        brightness: factor.
        contrast: factor.
        saturation: factor.
    """

    flip: bool = False
    zoom: int = 0
    down: int = UNIT // 2
    across: int = UNIT // 2
    brightness: int = UNIT
    contrast: int = UNIT
    saturation: int = UNIT


PLAIN = View()
"""The middle of the image, as it is."""


@dataclass(frozen=True)
class Cut:
    """What is encoded: a version of an image in a shape."""

    item: Item
    shape: Shape
    view: View = PLAIN


class Geometry(NamedTuple):
    """How an image covers a shape: its size once scaled, and the corner of the cut in it."""

    scaled: Shape
    top: int
    left: int


def views(sha256: str, source: DataSource) -> tuple[View, ...]:
    """The versions of an image that its source asks for; each sample shows one of them.

    Args:
        sha256: of the image's bytes, in hex; what the versions are drawn from.
        source: its `flip`, `crop_jitter`, `color` and `variants`.
    """
    drawn = [PLAIN]
    if source.varies:
        drawn = [_draw(sha256, number, source) for number in range(source.variants)]
    if not source.flip:
        return tuple(drawn)
    return tuple(view._replace(flip=flip) for view in drawn for flip in (False, True))


def geometry(width: int, height: int, shape: Shape, view: View = PLAIN) -> Geometry:
    """How an image of some size is scaled and cut: the smallest scale that leaves no gap, times
    what the view zooms as far as the image is large enough.
    """
    scaled = covering(width, height, shape)
    room = min(width * UNIT // scaled.width, height * UNIT // scaled.height)
    factor = max(min(UNIT + view.zoom, room), UNIT)
    scaled = Shape(scaled.height * factor // UNIT, scaled.width * factor // UNIT)
    top = (scaled.height - shape.height) * view.down // UNIT
    left = (scaled.width - shape.width) * view.across // UNIT
    return Geometry(scaled, top, left)


def size_ids(
    width: int, height: int, shape: Shape, view: View = PLAIN
) -> tuple[int, int, int, int, int, int]:
    """The six numbers that SDXL is told of an image's cut; known without its pixels.

    Source: Podell et al., arXiv 2307.01952, section 2.2. The corner is the one where `fit` cuts, in
    the image as the net sees it: in a mirrored one, from what was its right side.

    Args:
        width: of the upright image, in pixels.
        height: of the same.
        shape: what it is cut to.
        view: its version.

    Returns:
        Height and width of the image, top and left of the cut in pixels of the scaled image,
        height and width of the shape.
    """
    scaled, top, left = geometry(width, height, shape, view)
    if view.flip:
        left = scaled.width - shape.width - left
    return (height, width, top, left, shape.height, shape.width)


def fit(image: Image.Image, shape: Shape, view: View = PLAIN) -> Tensor:
    """Scales an image to cover `shape` (Lanczos), cuts it, and changes it as its view says.

    The cut is made in the coordinates of the original, so that a very long image never has to
    exist at its scaled size.

    Args:
        image: RGB, or L for a mask, whose colors no view changes.
        shape: of the result.
        view: the version.

    Returns:
        uint8 `[3, H, W]`, or `[1, H, W]` of a mask.
    """
    scaled, top, left = geometry(image.width, image.height, shape, view)
    across, down = image.width / scaled.width, image.height / scaled.height
    right = min((left + shape.width) * across, image.width)
    bottom = min((top + shape.height) * down, image.height)
    cut = image.resize(
        (shape.width, shape.height),
        Image.Resampling.LANCZOS,
        box=(left * across, top * down, right, bottom),
    )
    if image.mode == "RGB":
        cut = _colored(cut, view)
    if view.flip:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(cut))
    return (pixels[..., None] if pixels.ndim == 2 else pixels).permute(2, 0, 1).contiguous()


def _draw(sha256: str, number: int, source: DataSource) -> View:
    random = generator(int(sha256[:15], 16), "view", sample=number)

    def below(limit: int) -> int:
        return int(torch.randint(limit + 1, (), generator=random))

    narrowed = below(round(source.crop_jitter * UNIT))  # the cut has 1 - this of its side
    change = round(source.color * UNIT)
    place = (below(UNIT), below(UNIT)) if source.crop_jitter else (PLAIN.down, PLAIN.across)
    colors = [UNIT + below(2 * change) - change for _ in range(3)]
    zoom = narrowed * UNIT // max(UNIT - narrowed, 1)
    return View(False, zoom, *place, *colors)


def _colored(image: Image.Image, view: View) -> Image.Image:
    changes = (
        (ImageEnhance.Brightness, view.brightness),
        (ImageEnhance.Contrast, view.contrast),
        (ImageEnhance.Color, view.saturation),
    )
    for change, factor in changes:
        if factor != UNIT:
            image = change(image).enhance(factor / UNIT)
    return image

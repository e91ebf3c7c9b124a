"""Masks: which parts of an image are learned, by the brightness of each pixel, 0 to 255.

A mask is a file beside the image, or the image's own transparency. It is as upright as the image,
and of its size or of its aspect.
"""

import sys
from pathlib import Path

from PIL import Image

from eri.data.checked import Checks, Finding, look
from eri.data.images import HashedFile, alpha_of, decode_open, hashed_as
from eri.data.items import Mask
from eri.errors import DataError
from eri.printable import printable

__all__ = ["check_mask", "read_mask"]

BLACK = "#000000"


def check_mask(path: Path, size: tuple[int, int], checks: Checks, *, pixel_cap: int) -> Mask:
    """Decodes a mask file and refuses one that cannot be meant.

    Args:
        path: of the mask.
        size: width and height of its image, upright, in pixels.
        checks: what was found before, and is added to.
        pixel_cap: the most pixels that it may have.

    Raises:
        DataError: it cannot be decoded, is wholly black, or has another aspect than its image.
    """

    def find(file: HashedFile) -> Finding:
        mask = _brightness(file, pixel_cap)
        return Finding(*mask.size, 1, False, mask.getbbox() is None)

    sha256, finding = look(path, checks, "mask", pixel_cap=pixel_cap, find=find)
    if not _same_aspect((finding.width, finding.height), size):
        what = (
            f"the mask has {finding.width} x {finding.height} pixels and its image "
            f"{size[0]} x {size[1]}; give it the size of the image"
        )
        raise DataError(what, where=printable(path))
    if finding.blank:
        what = "the mask is wholly black, so nothing would be learned; paint white what is"
        raise DataError(what, where=printable(path))
    return Mask(path=path, sha256=sha256, alpha=False)


def read_mask(mask: Mask, size: tuple[int, int]) -> Image.Image:
    """Reads a checked mask.

    Args:
        mask: of a checked item.
        size: width and height of its image, upright, in pixels.

    Returns:
        Mode L of that size, upright; 255 is learned, 0 is not.

    Raises:
        DataError: the file changed since it was checked, or cannot be read; names it.
    """
    with hashed_as(mask.path, mask.sha256) as file:
        cap = sys.maxsize  # these very bytes were checked against the source's own
        pixels = alpha_of(file, pixel_cap=cap) if mask.alpha else _brightness(file, cap)
    if pixels.size == size:
        return pixels
    return pixels.resize(size, Image.Resampling.BILINEAR)


def _brightness(file: HashedFile, pixel_cap: int) -> Image.Image:
    """Mode L; what is transparent is not learned."""
    return decode_open(file, pixel_cap=pixel_cap, background=BLACK).image.convert("L")


def _same_aspect(mask: tuple[int, int], image: tuple[int, int]) -> bool:
    """Whether one scaled to the other misses it by at most a pixel of the smaller one."""
    return abs(mask[0] * image[1] - mask[1] * image[0]) <= max(*mask, *image)

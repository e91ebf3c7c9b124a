"""One image file to RGB pixels, or to one line that says why not.

The file's content decides its format, not its name. The size is read from the header before any
pixel is decoded, every pixel is decoded (a cut file is an error, never grey), and every mode is
turned to RGB on purpose: orientation applied, CMYK through its profile, 16 bits scaled and not
clipped, transparency laid on white.
"""

import errno
import hashlib
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps

from eri.errors import DataError
from eri.printable import printable

__all__ = ["PIXEL_CAP", "Decoded", "decode", "open_regular", "pillow_warnings_ignored"]

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF", "GIF")
"""Pillow's readers that may see a file; it has many more, some of which start other programs."""

PIXEL_CAP = 100_000_000
"""The most pixels that an image may have; a small file can decode to gigabytes."""

DISGUISES = (
    (b"version https://git-lfs", "a git-lfs pointer, not the image; run `git lfs pull`"),
    (b"<!doctype html", "a web page, not an image; download the image again"),
    (b"<html", "a web page, not an image; download the image again"),
    (b"<svg", "an SVG drawing; save it as PNG"),
    (b"<?xml", "an XML file; if it is a drawing, save it as PNG"),
    (b"%pdf", "a PDF; save it as PNG"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"pk\x03\x04", "a zip archive; unpack it"),
    (b"8bps", "a Photoshop file; save it as PNG"),
    (b"\xff\x0a", "a JPEG XL image; save it as PNG"),
    (b"\0\0\0\x0cjxl ", "a JPEG XL image; save it as PNG"),
)
"""What a file is instead of an image, by how it begins in lower case."""


class Decoded(NamedTuple):
    """An image in RGB, upright, and the SHA-256 of the bytes it was read from, in hex."""

    image: Image.Image
    sha256: str


def decode(path: Path, *, pixel_cap: int = PIXEL_CAP) -> Decoded:
    """Reads an image file to the last pixel; of an animation, the first frame.

    Raises:
        DataError: the file cannot be opened, is no image of a known format, is damaged, or has more
            than `pixel_cap` pixels; names the file.
    """
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        try:
            return Decoded(_pixels(file, pixel_cap), digest)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            what = f"more than {pixel_cap // 1_000_000} million pixels; scale it down"
            raise DataError(what, where=printable(path)) from error
        except Exception as error:  # Pillow's decoders raise whatever they stumble over
            raise DataError(_reason(file, error), where=printable(path)) from error


def open_regular(path: Path) -> BufferedReader:
    """Opens a file for reading; a pipe or a device, which would block or never end, is refused.

    Raises:
        DataError: it cannot be opened; names the file.
    """
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return path.open("rb")
        what = "not a regular file"
    except OSError as error:
        what = f"cannot be opened: {error.strerror}"
        if error.errno == errno.ELOOP:
            what = "a link that leads in a circle"
        elif path.is_symlink():
            what = f"a link to '{printable(os.readlink(path))}', which cannot be opened"
    raise DataError(what, where=printable(path))


@contextmanager
def pillow_warnings_ignored() -> Iterator[None]:
    """Keeps Pillow's warnings, of odd metadata and of sizes below our own limit, off the screen.

    Warnings are a matter of the whole process, so this goes around all the threads that decode.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _pixels(file: BufferedReader, pixel_cap: int) -> Image.Image:
    with Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > pixel_cap:
            raise Image.DecompressionBombError  # as Pillow does for much larger ones
        return _rgb(ImageOps.exif_transpose(image))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _from_16_bits(image)
    if image.mode in {"I", "F"}:
        raise ValueError(f"32-bit pixels (mode {image.mode}); save it with 8 or 16 bits")
    if image.mode == "CMYK":
        return _from_cmyk(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")


def _from_cmyk(image: Image.Image) -> Image.Image:
    embedded = image.info.get("icc_profile")
    if embedded is None:
        return image.convert("RGB")
    try:
        inks = ImageCms.ImageCmsProfile(BytesIO(embedded))
        screen = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, inks, screen, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):  # a profile that is broken, or not of CMYK
        return image.convert("RGB")
    return converted or image.convert("RGB")


def _reason(file: BufferedReader, error: Exception) -> str:
    file.seek(0)
    head = file.read(512)
    if not head:
        return "the file is empty"
    start = head.lower().lstrip(b"\xef\xbb\xbf \t\r\n")
    for beginning, meaning in DISGUISES:
        if start.startswith(beginning):
            return meaning
    if head[4:12] in {b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1"}:
        return "an HEIC image; save it as JPEG or PNG"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image of a known format ({', '.join(FORMATS)})"
    return f"damaged: {printable(str(error) or type(error).__name__)}"

"""One image file to RGB pixels, or to one line that says why not.

The file's content decides its format, not its name. The size is read from the header before any
pixel is decoded, every pixel is decoded (a cut file is an error, never grey), and every mode is
turned to RGB on purpose: orientation applied, CMYK through its profile, 16 bits scaled and not
clipped, transparency laid on a background. Large images are decoded one at a time, whatever the
number of threads.
"""

import errno
import hashlib
import logging
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageCms, ImageOps

from eri.errors import DataError
from eri.printable import printable

__all__ = [
    "Decoded",
    "HashedFile",
    "alpha_of",
    "decode",
    "decode_open",
    "format_of",
    "hashed",
    "hashed_as",
    "open_regular",
    "pillow_warnings_ignored",
    "too_large",
]

Result = TypeVar("Result")

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF", "GIF")
"""Pillow's readers that may see a file; it has many more, some of which start other programs."""

HEAD = 512  # bytes that show what a file is
ANEW = "copy it again, or save it anew"
WHITE = "#ffffff"
LARGE = 25_000_000  # pixels; with its copies such an image takes a gigabyte
LARGE_ONES = threading.Lock()
PILLOWS_LIMIT = threading.Lock()
STDERR = threading.Lock()

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


BEGINNINGS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"RIFF": "WEBP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
"""How files of the known formats begin; of AVIF and BMP, it is not the first bytes alone."""


class UnsupportedError(ValueError):
    """An image that is whole and of a kind that is not read; says what to do."""


class HashedFile(NamedTuple):
    """An open file and the SHA-256 of its bytes, in hex."""

    path: Path
    stream: BufferedReader
    sha256: str


class Decoded(NamedTuple):
    """What an image file holds.

    Args:
        image: RGB, upright.
        sha256: of the bytes that it was read from, in hex.
        transparent: whether any of it shows the background.
        frames: of an animation, whose first one this is; pages of a TIFF; 1 of all others.
        invisible: whether all of it is the background.
    """

    image: Image.Image
    sha256: str
    transparent: bool
    frames: int
    invisible: bool


def decode(path: Path, *, pixel_cap: int, background: str | None = None) -> Decoded:
    """Reads an image file to the last pixel; of an animation, the first frame.

    Args:
        path: of the file.
        pixel_cap: the most pixels it may have; of a checked image, `width * height`.
        background: what its transparent parts are laid on, "#rrggbb"; white unless given.

    Raises:
        DataError: the file cannot be opened, is no image of a known format, is damaged, or has more
            than `pixel_cap` pixels; names the file.
    """
    with hashed(path) as file:
        return decode_open(file, pixel_cap=pixel_cap, background=background)


def decode_open(file: HashedFile, *, pixel_cap: int, background: str | None = None) -> Decoded:
    """`decode` for a file that is open and hashed."""

    def use(image: Image.Image) -> Decoded:
        pixels, (least, most) = _rgb(image, background or WHITE)
        return Decoded(pixels, file.sha256, least < 255, _frames(image), most == 0)

    return _read(file, pixel_cap, use)


def alpha_of(file: HashedFile, *, pixel_cap: int) -> Image.Image:
    """How visible each pixel of an upright image is, as mode L: 255 where it is opaque.

    Raises:
        DataError: as `decode` does.
    """
    return _read(file, pixel_cap, _alpha)


@contextmanager
def hashed(path: Path) -> Iterator[HashedFile]:
    """Opens a file and hashes it, before anything looks into it.

    Raises:
        DataError: it cannot be opened or read, or is a pipe, a device or a folder; names it.
    """
    with open_regular(path) as stream:
        try:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            what = f"cannot be read: {error.strerror}; copy it to another disk"
            raise DataError(what, where=printable(path)) from error
        yield HashedFile(path, stream, digest)


@contextmanager
def hashed_as(path: Path, sha256: str) -> Iterator[HashedFile]:
    """`hashed` for a file that was checked before, when its bytes had this hash.

    Raises:
        DataError: as `hashed` does, and where the hash is another one now.
    """
    with hashed(path) as file:
        if file.sha256 != sha256:
            what, hint = "the file changed while the images were prepared", "run the command again"
            raise DataError(what, where=printable(path), hint=hint)
        yield file


def format_of(path: Path) -> str | None:
    """Which of the known formats a file begins like; None if none. Nothing is decoded.

    Raises:
        DataError: it cannot be opened or read; names the file.
    """
    with open_regular(path) as stream:
        try:
            return _begins_as(stream.read(HEAD))
        except OSError as error:
            what = f"cannot be read: {error.strerror}; copy it to another disk"
            raise DataError(what, where=printable(path)) from error


def open_regular(path: Path) -> BufferedReader:
    """Opens a file for reading; a pipe or a device, which would block or never end, is refused.

    Raises:
        DataError: it cannot be opened; names the file.
    """
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return path.open("rb")
        what = "not a regular file; remove it"
    except OSError as error:
        what = f"cannot be opened: {error.strerror}; make it readable, or remove it"
        if error.errno == errno.ELOOP:
            what = "a link that leads in a circle; remove it"
        elif path.is_symlink():
            target = printable(os.readlink(path))
            what = f"a link to '{target}', which cannot be opened; remove it"
    raise DataError(what, where=printable(path))


def too_large(width: int, height: int, pixel_cap: int) -> str:
    """The reason why an image of more than `pixel_cap` pixels is refused."""
    return (
        f"{width} x {height} are more than {pixel_cap / 1_000_000:g} million pixels; "
        "scale it down, or raise max_megapixels"
    )


@contextmanager
def pillow_warnings_ignored() -> Iterator[None]:
    """Keeps what Pillow warns of and logs, of odd metadata, off the screen; errors are raised.

    Both are a matter of the whole process, so this goes around all the threads that decode.
    """
    log = logging.getLogger("PIL")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _read(file: HashedFile, pixel_cap: int, use: Callable[[Image.Image], Result]) -> Result:
    """What `use` makes of the upright image in a file."""
    where = printable(file.path)
    try:
        with _opened(file.stream) as image:
            pixels = image.width * image.height
            if pixels > pixel_cap:
                raise DataError(too_large(*image.size, pixel_cap), where=where)
            alone = LARGE_ONES if pixels > LARGE else nullcontext()
            silence = _stderr_closed() if image.format == "TIFF" else nullcontext()
            with alone, silence:
                ImageOps.exif_transpose(image, in_place=True)
                return use(image)
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        raise DataError(_reason(file.stream, error), where=where) from error


def _opened(stream: BufferedReader) -> Image.Image:
    stream.seek(0)
    with PILLOWS_LIMIT:  # of sizes: one for the whole process, and not the source's own
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(stream, formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def _stderr_closed() -> Iterator[None]:
    """Keeps libtiff silent, which writes to stderr by itself; Pillow raises errors all the same."""
    with STDERR:
        try:
            screen = os.dup(2)
        except OSError:  # there is none
            yield
            return
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(screen, 2)
            os.close(screen)


def _frames(image: Image.Image) -> int:
    if image.format == "MPO":  # a photo with a second view or a thumbnail in it
        return 1
    return getattr(image, "n_frames", 1)


def _rgb(image: Image.Image, background: str) -> tuple[Image.Image, tuple[int, int]]:
    """RGB pixels, and how visible the least and the most visible of them are (0 to 255)."""
    if image.mode in {"I", "F"}:
        raise UnsupportedError(f"32-bit pixels (mode {image.mode}); save it with 8 or 16 bits")
    if image.mode == "CMYK":
        return _from_cmyk(image), (255, 255)
    embedded = image.info.get("icc_profile")
    image = _to_8_bits(image)
    if not image.has_transparency_data:
        return _in_srgb(image.convert("RGB"), embedded), (255, 255)
    layered = _in_srgb(image if image.mode == "RGBA" else image.convert("RGBA"), embedded)
    least, most = layered.getchannel("A").getextrema()
    if not isinstance(least, int) or not isinstance(most, int):
        raise TypeError("an alpha channel of more than 8 bits")
    if least < 255:
        layered = Image.alpha_composite(Image.new("RGBA", image.size, background), layered)
    return layered.convert("RGB"), (least, most)


def _alpha(image: Image.Image) -> Image.Image:
    image = _to_8_bits(image)
    if not image.has_transparency_data:
        return Image.new("L", image.size, 255)
    return image.convert("RGBA").getchannel("A")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16 bits scaled to 8, with the one transparent value that such a PNG may name."""
    if not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    hidden = image.info.get("transparency")
    if hidden is not None:
        grey.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    return grey


def _from_cmyk(image: Image.Image) -> Image.Image:
    converted = _by_profile(image, image.info.get("icc_profile"), "RGB")
    return converted or image.convert("RGB")


def _in_srgb(image: Image.Image, embedded: bytes | None) -> Image.Image:
    """RGB or RGBA pixels of another color space, as of phones and cameras, in that of the net."""
    return _by_profile(image, embedded, image.mode) or image


def _by_profile(image: Image.Image, embedded: bytes | None, mode: str) -> Image.Image | None:
    """Pixels in sRGB; None where there is nothing to change or a profile says nothing of them."""
    if not embedded:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(BytesIO(embedded))
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return None
        screen = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, profile, screen, outputMode=mode)
    except (ImageCms.PyCMSError, OSError):  # a profile that is broken, or of other colors
        return None


def _begins_as(head: bytes) -> str | None:
    if head[4:12] in {b"ftypavif", b"ftypavis"}:
        return "AVIF"
    if head[:2] == b"BM" and head[6:10] == bytes(4):  # its size between them, and nothing behind
        return "BMP"
    return next((kind for start, kind in BEGINNINGS.items() if head.startswith(start)), None)


def _reason(stream: BufferedReader, error: Exception) -> str:
    stream.seek(0)
    head = stream.read(HEAD)
    start = head.lower().lstrip(b"\xef\xbb\xbf \t\r\n")
    if not head:
        return "the file is empty; copy it again, or remove it"
    if head[4:12] in {b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1"}:
        return "an HEIC image; save it as JPEG or PNG"
    if isinstance(error, Image.UnidentifiedImageError):
        what = f"not an image of a known format ({', '.join(FORMATS)}); save it as one of these"
        if _begins_as(head):
            what = f"damaged: its header cannot be read; {ANEW}"
        return next((meaning for begins, meaning in DISGUISES if start.startswith(begins)), what)
    if isinstance(error, MemoryError):
        return "damaged, or too large for the memory; scale it down, or save it anew"
    if isinstance(error, UnsupportedError):
        return str(error)
    return f"damaged: {printable(str(error) or type(error).__name__)}; {ANEW}"

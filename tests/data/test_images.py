import io
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from eri.data import images
from eri.data.images import (
    FORMATS,
    Decoded,
    alpha_of,
    format_of,
    hashed,
    hashed_as,
    pillow_warnings_ignored,
)
from eri.errors import DataError

CORNERS = {(0, 0): (255, 0, 0), (1, 0): (0, 255, 0), (0, 1): (0, 0, 255), (1, 1): (255, 255, 0)}


def picture(width: int = 40, height: int = 20) -> Image.Image:
    """Four coloured quarters, so that every turn and flip shows."""
    image = Image.new("RGB", (width, height))
    for (x, y), colour in CORNERS.items():
        box = (x * width // 2, y * height // 2, (x + 1) * width // 2, (y + 1) * height // 2)
        image.paste(colour, box)
    return image


def decode(path: Path, **options: Any) -> Decoded:
    return images.decode(path, **{"pixel_cap": 100_000_000, **options})


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def equal(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and bool((np.asarray(one) == np.asarray(other)).all())


def refused(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        decode(path)
    assert path.name.split("\x1b")[0] in (caught.value.where or "")
    assert str(caught.value).isprintable()
    return caught.value


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read_whatever_the_name_says(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(encoded(picture(), kind))
    image = decode(path).image
    assert (image.mode, image.size) == ("RGB", (40, 20))
    for (x, y), colour in CORNERS.items():
        found = np.asarray(image)[3 + 13 * y, 5 + 28 * x].astype(int)
        assert np.abs(found - colour).max() <= 24


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_comes_out_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "image"
    path.write_bytes(encoded(picture(), kind, exif=exif, quality=95))
    upright = picture().transpose(turns[orientation]) if orientation > 1 else picture()
    image = decode(path).image
    assert image.size == upright.size
    difference = np.asarray(image).astype(int) - np.asarray(upright)
    assert np.abs(difference).mean() < 10  # another orientation is off by 50 and more


def test_a_tiff_comes_out_upright(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    picture().save(path, tiffinfo={274: 6})
    assert equal(decode(path).image, picture().transpose(Image.Transpose.ROTATE_270))


def test_the_hash_is_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    picture().save(path)
    first = decode(path).sha256
    os.utime(path, (1, 1))
    assert decode(path).sha256 == first
    path.write_bytes(path.read_bytes() + b"\0")
    assert decode(path).sha256 != first


# modes


def test_16_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 511, 40000, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        image = decode(tmp_path / name).image
        assert [image.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 2, 156, 255)]


def test_big_endian_16_bits(tmp_path: Path) -> None:
    values = np.array([[0, 40000]], dtype=np.uint16)
    native = encoded(Image.fromarray(values), "TIFF")
    assert native[:2] == b"II"
    image = Image.frombytes("I;16B", (2, 1), values.astype(">u2").tobytes())
    image.save(tmp_path / "a.tif")
    assert decode(tmp_path / "a.tif").image.getpixel((1, 0)) == (156, 156, 156)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_are_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "a.tif")
    assert "32-bit" in refused(tmp_path / "a.tif").what


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (2, 1), "black")
    image.putalpha(Image.new("L", (2, 1), 0))
    image.putpixel((1, 0), (0, 0, 0, 128) if mode == "RGBA" else (0, 128))
    image.save(tmp_path / "a.png")
    decoded = decode(tmp_path / "a.png").image
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((1, 0)) == (127, 127, 127)


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_is_white(tmp_path: Path, mode: str) -> None:
    hidden: object = {"P": 1, "L": 7, "RGB": (9, 0, 0)}[mode]
    image = Image.new(mode, (2, 1), hidden)  # type: ignore[arg-type]
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((1, 0), {"P": 0, "L": 0, "RGB": (0, 0, 0)}[mode])
    image.save(tmp_path / "a.png", transparency=hidden)
    decoded = decode(tmp_path / "a.png").image
    assert [decoded.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (0, 0, 0)]


def test_transparency_is_laid_on_the_background_that_was_asked_for(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    image.save(tmp_path / "a.png")
    decoded = decode(tmp_path / "a.png", background="#0080ff")
    assert decoded.transparent
    assert not decoded.invisible
    assert [decoded.image.getpixel((x, 0)) for x in range(2)] == [(0, 128, 255), (0, 64, 127)]


@pytest.mark.parametrize(
    ("alpha", "transparent", "invisible"),
    [(255, False, False), (254, True, False), (0, True, True)],
)
def test_only_what_shows_the_background_is_transparent(
    tmp_path: Path, alpha: int, transparent: bool, invisible: bool
) -> None:
    image = picture()
    image.putalpha(alpha)
    image.save(tmp_path / "a.png")
    decoded = decode(tmp_path / "a.png")
    assert (decoded.transparent, decoded.invisible) == (transparent, invisible)
    if not transparent:
        assert equal(decoded.image, picture())


def test_16_bits_with_a_transparent_value(tmp_path: Path) -> None:
    values = np.array([[7, 0]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png", transparency=7)
    decoded = decode(tmp_path / "a.png", background="#ff0000")
    assert [decoded.image.getpixel((x, 0)) for x in range(2)] == [(255, 0, 0), (0, 0, 0)]


def test_transparency_alone_is_as_upright_as_the_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    image = picture(2, 1)
    image.putalpha(Image.frombytes("L", (2, 1), b"\x00\x80"))
    image.save(tmp_path / "a.png", exif=exif)
    picture().save(tmp_path / "b.png")
    with hashed(tmp_path / "a.png") as file:
        alpha = alpha_of(file, pixel_cap=2)
    assert (alpha.mode, alpha.size, list(alpha.tobytes())) == ("L", (1, 2), [0, 128])
    with hashed(tmp_path / "b.png") as file:
        assert alpha_of(file, pixel_cap=800).getextrema() == (255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palettes(tmp_path: Path, mode: str) -> None:
    picture().convert(mode).save(tmp_path / "a.png")
    expected = picture().convert(mode).convert("RGB")
    assert equal(decode(tmp_path / "a.png").image, expected)


def grey_profile() -> bytes:
    """An ICC profile of CMYK whose coloured inks are all the same grey: L = 50 of 100."""

    def text(words: bytes) -> bytes:
        return b"desc\0\0\0\0" + struct.pack(">I", len(words) + 1) + words + bytes(79)

    matrix = struct.pack(">9I", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    curve = bytes(range(256))
    paper, grey, black = bytes([255, 128, 128]), bytes([128, 128, 128]), bytes([0, 128, 128])
    grid = paper + black + (grey + black) * 7  # the amount of black is what changes fastest
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + curve * 4 + grid + curve * 3
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    tags = [(b"desc", text(b"test")), (b"cprt", text(b"none")), (b"wtpt", white), (b"A2B0", table)]
    offset = 128 + 4 + 12 * len(tags)
    index, data = struct.pack(">I", len(tags)), b""
    for name, content in tags:
        content += bytes(-len(content) % 4)
        index += name + struct.pack(">II", offset + len(data), len(content))
        data += content
    header = struct.pack(">I4s", offset + len(data), b"")
    header += b"\x02\x40\0\0prtrCMYKLab " + bytes(12) + b"acsp" + bytes(24)
    header += struct.pack(">I3i", 0, 63190, 65536, 54061)
    return header + bytes(128 - len(header)) + index + data


def test_cmyk_goes_through_its_profile(tmp_path: Path) -> None:
    image = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    image.save(tmp_path / "plain.jpg")
    assert decode(tmp_path / "plain.jpg").image.getpixel((0, 0)) == (255, 0, 0)
    image.save(tmp_path / "profile.jpg", icc_profile=grey_profile())
    red, green, blue = np.asarray(decode(tmp_path / "profile.jpg").image)[0, 0].tolist()
    assert 100 < red < 130
    assert max(red, green, blue) - min(red, green, blue) <= 4


@pytest.mark.parametrize("profile", [b"garbage", b""])
def test_a_broken_profile_of_cmyk_is_left_aside(tmp_path: Path, profile: bytes) -> None:
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "a.jpg", icc_profile=profile)
    assert decode(tmp_path / "a.jpg").image.getpixel((0, 0)) == (255, 0, 0)


def turned_profile() -> bytes:
    """An ICC profile of RGB whose red is sRGB's blue, and whose blue its red."""
    found = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    named = found.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))
    return named.replace(b"rXYZ", b"____").replace(b"bXYZ", b"rXYZ").replace(b"____", b"bXYZ")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_other_colors_are_those_of_a_screen(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "a", kind, icc_profile=turned_profile())
    red, green, blue = np.asarray(decode(tmp_path / "a").image)[4, 4].tolist()
    assert red < 8 and green < 8 and blue > 247


def test_they_are_before_they_are_laid_on_the_background(tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    image.paste((255, 0, 0, 0), (0, 0, 8, 4))
    image.save(tmp_path / "a.png", icc_profile=turned_profile())
    found = decode(tmp_path / "a.png", background="#ff0000").image
    assert [found.getpixel(at) for at in ((0, 0), (0, 7))] == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize("profile", [b"garbage", grey_profile(), turned_profile()[:200]])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_a_profile_of_nothing_that_is_there_is_left_aside(
    tmp_path: Path, mode: str, profile: bytes
) -> None:
    picture().convert(mode).save(tmp_path / "a.png", icc_profile=profile)
    assert equal(decode(tmp_path / "a.png").image, picture().convert(mode).convert("RGB"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_used(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a", kind, save_all=True, append_images=frames[1:])
    decoded = decode(tmp_path / "a")
    red, _, blue = np.asarray(decoded.image)[4, 4]
    assert red > 200 > 60 > blue
    assert decoded.frames == 2


# files that are no image


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "TIFF", "AVIF"])
@pytest.mark.parametrize("keep", [0.02, 0.3, 0.6, 0.95])
def test_a_cut_file_is_refused(tmp_path: Path, kind: str, keep: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), kind)
    path = tmp_path / "cut.jpg"
    path.write_bytes(content[: int(len(content) * keep)])
    refused(path)


@pytest.mark.parametrize("missing", [1, 2, 3, 100, 1000])
def test_a_jpeg_without_its_end_is_refused(tmp_path: Path, missing: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / "cut.jpg"
    path.write_bytes(encoded(Image.fromarray(noise), "JPEG")[:-missing])
    assert "damaged" in refused(path).what


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.6, 0.95])
def test_a_cut_png_is_refused(tmp_path: Path, keep: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), "PNG")
    (tmp_path / "cut.png").write_bytes(content[: int(len(content) * keep)])
    refused(tmp_path / "cut.png")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"hello", "not an image of a known format"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"<HTML>", "a web page"),
        (b"\xef\xbb\xbf<svg xmlns=''>", "an SVG"),
        (b"%PDF-1.7", "a PDF"),
        (b"PK\x03\x04", "a zip archive"),
        (b"8BPS\0\1", "a Photoshop file"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
    ],
)
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    assert words in refused(path).what


@pytest.mark.parametrize("kind", FORMATS)
def test_a_format_is_known_by_how_a_file_begins(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a").write_bytes(encoded(picture(), kind)[:100])
    assert format_of(tmp_path / "a") == kind


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"BMW, a car", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", b"8BPS\0\1"]
)
def test_what_is_of_no_known_format_begins_like_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    assert format_of(tmp_path / "a") is None


def test_a_file_that_changed_since_it_was_checked_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    with hashed(path) as file:
        before = file.sha256
    with hashed_as(path, before) as file:
        assert file.sha256 == before
    path.write_bytes(b"two")
    with pytest.raises(DataError, match="the file changed") as caught, hashed_as(path, before):
        pass
    assert (caught.value.where, caught.value.hint) == (str(path), "run the command again")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def dangling(path: Path) -> None:
    path.symlink_to("no\x1bwhere")


def circle(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (fifo, "not a regular file"),
        (Path.mkdir, "not a regular file"),
        (dangling, "a link to 'no\\x1bwhere'"),
        (circle, "in a circle"),
        (lambda path: None, "No such file"),
    ],
)
def test_what_is_no_file_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], None], words: str
) -> None:
    make(tmp_path / "a.png")
    assert words in refused(tmp_path / "a.png").what


def test_a_hostile_name_is_printed_escaped(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\x1b[2J\xff.png"))
    path.write_bytes(b"x")
    assert "a\\x1b[2J\\udcff.png" in (refused(path).where or "")


def test_a_small_file_of_many_pixels_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (10_001, 10_001)).save(path)
    assert path.stat().st_size < 20_000
    what = "10001 x 10001 are more than 100 million pixels; scale it down, or raise max_megapixels"
    assert refused(path).what == what


def test_the_cap_on_pixels_can_be_set(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture(1000, 1000).save(path)
    assert decode(path, pixel_cap=1_000_000).image.size == (1000, 1000)
    with pytest.raises(DataError, match="more than"):
        decode(path, pixel_cap=999_999)


def test_the_limit_is_ours_and_not_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # warns from 100 on, refuses 200
    assert decode(tmp_path / "a.png").image.size == (40, 20)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_libtiff_does_not_write_to_the_screen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = bytearray(encoded(picture(), "TIFF", compression="tiff_deflate"))
    content[20] ^= 255
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    refused(path)
    assert capfd.readouterr().err == ""
    with pytest.raises(OSError), Image.open(path) as image:
        image.load()
    assert "ZIPDecode" in capfd.readouterr().err  # it would, and stderr is open again


def test_pillow_does_not_log_to_the_screen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = encoded(picture(), "TIFF")
    samples = struct.pack("<HHI", 277, 3, 1)  # the tag of samples per pixel
    at = content.index(samples) + len(samples)
    (tmp_path / "a.tif").write_bytes(content[:at] + b"\xff" + content[at + 1 :])
    with pillow_warnings_ignored():
        refused(tmp_path / "a.tif")
    assert not caplog.records
    refused(tmp_path / "a.tif")
    assert "samples per pixel" in caplog.text  # it would, and may again


def test_only_the_listed_readers_see_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture(), "PCX"))
    assert "not an image of a known format" in refused(path).what


def test_a_mutated_file_is_decoded_or_refused_by_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "a.png"
    originals = [encoded(picture(), kind) for kind in FORMATS]
    for turn in range(350):
        content = bytearray(originals[turn % len(originals)])
        for _ in range(int(rng.integers(1, 5))):
            content[int(rng.integers(len(content)))] = int(rng.integers(256))
        path.write_bytes(content)
        try:
            assert decode(path).image.mode == "RGB"
        except DataError as error:
            assert error.where is not None


def test_cut_files_are_never_filled_with_grey(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    decode(tmp_path / "a.png")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES

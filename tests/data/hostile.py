"""A folder of everything that goes wrong with images and captions, made in a second or two."""

import io
import json
import os
import stat
import struct
import unicodedata
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.data.test_images import grey_profile

__all__ = ["LOCKED", "build_hostile", "jpeg", "pixels", "png_by_hand"]

LOCKED = ("unreadable.png", "locked")
"""A file and a folder without permissions, which root can read all the same."""

TWINS = tuple(unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))


def pixels(width: int = 64, height: int = 64) -> Image.Image:
    """Noise, which no format makes small."""
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def jpeg(image: Image.Image | None = None, **options: Any) -> bytes:
    return encoded(image or pixels(), "JPEG", **options)


def png_by_hand(width: int, height: int, chunks: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
    """A black PNG of 1 bit a pixel, whole and small whatever its size; chunks come before it."""
    row = bytes((width + 7) // 8 + 1)
    packer = zlib.compressobj(1)
    packed = [packer.compress(row * min(64, height - y)) for y in range(0, height, 64)]
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = b"".join([*packed, packer.flush()])
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in parts
    )


def build_hostile(folder: Path) -> Path:
    """Makes the folder; each image has a caption unless its captions are what is wrong."""
    folder.mkdir(parents=True)
    files = {**damaged(), **no_images(), **modes(), **turned(), **moving(), **sizes()}
    for name, content in files.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("a picture")
    odd_files(folder)
    odd_names(folder)
    captions(folder)
    tables(folder)
    (folder / "good-masklabel.png").write_bytes(encoded(Image.new("L", (64, 64), 255), "PNG"))
    return folder


def damaged() -> dict[str, bytes]:
    noise = pixels()
    whole = {
        "cut.jpg": jpeg(),
        "cut.png": encoded(noise, "PNG"),
        "cut.webp": encoded(noise, "WEBP", lossless=True),
        "cut.avif": encoded(noise, "AVIF"),
        "cut.bmp": encoded(noise, "BMP"),
        "cut.tif": encoded(noise, "TIFF", compression="tiff_lzw"),
        "cut.gif": encoded(noise, "GIF"),
    }
    cut = {f"cut-{name[4:]}-half{name[3:]}": data[: len(data) // 2] for name, data in whole.items()}
    return cut | {
        "good.png": whole["cut.png"],
        "cut-jpg-header.jpg": whole["cut.jpg"][:20],
        "cut-jpg-end.jpg": whole["cut.jpg"][:-2],
        "cut-png-end.png": whole["cut.png"][:-100],
    }


def no_images() -> dict[str, bytes]:
    return {
        "empty.png": b"",
        "text.jpg": b"hello",
        "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "photo.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "ztxt.png": png_by_hand(64, 64, [(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7)))]),
    }


def modes() -> dict[str, bytes]:
    cmyk = Image.new("CMYK", (64, 64), (0, 255, 255, 0))
    grey = Image.fromarray(np.full((64, 64), 40_000, dtype=np.uint16))
    half = Image.new("LA", (64, 64), (0, 128))
    indexed = Image.new("P", (64, 64), 1)
    indexed.putpalette([0, 0, 0, 255, 0, 0])
    return {
        "jpeg-named.png": jpeg(),
        "png-named.jpg": encoded(pixels(), "PNG"),
        "cmyk.jpg": jpeg(cmyk),
        "cmyk-profile.jpg": jpeg(cmyk, icc_profile=grey_profile()),
        "16-bit.png": encoded(grey, "PNG"),
        "16-bit.tif": encoded(grey, "TIFF"),
        "32-bit.tif": encoded(Image.new("F", (64, 64)), "TIFF"),
        "la.png": encoded(half, "PNG"),
        "p-trns.png": encoded(indexed, "PNG", transparency=1),
        "opaque-alpha.png": encoded(pixels().convert("RGBA"), "PNG"),
    }


def turned() -> dict[str, bytes]:
    files = {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        files[f"exif-{orientation}.jpg"] = jpeg(pixels(80, 64), exif=exif, quality=orientation + 80)
    return files


def moving() -> dict[str, bytes]:
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    options: dict[str, Any] = {"save_all": True, "append_images": frames[1:]}
    return {
        "moving.gif": encoded(frames[0], "GIF", **options),
        "moving.webp": encoded(frames[0], "WEBP", **options),
        "moving.png": encoded(frames[0], "PNG", **options),
        "pages.tif": encoded(frames[0], "TIFF", **options),
    }


def sizes() -> dict[str, bytes]:
    return {
        "1x1.png": png_by_hand(1, 1),
        "1x30000.png": png_by_hand(1, 30_000),
        "bomb-81.png": png_by_hand(9000, 9000),
        "bomb-144.png": png_by_hand(12_000, 12_000),
        "bomb-179.6.png": png_by_hand(13_400, 13_403),
        "bomb-400.png": png_by_hand(20_000, 20_000),
    }


def odd_files(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    os.mknod(folder / "socket.png", stat.S_IFSOCK | 0o600)
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "folder.png").mkdir()
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "unreadable.png").write_bytes(jpeg())
    (folder / "unreadable.png").chmod(0)
    (folder / "locked").mkdir()
    (folder / "locked" / "a.png").write_bytes(jpeg())
    (folder / "locked").chmod(0)
    (folder / "circle").symlink_to(folder)


def odd_names(folder: Path) -> None:
    for quality, name in zip((60, 61), TWINS, strict=True):
        (folder / name).write_bytes(jpeg(quality=quality))
        (folder / name).with_suffix(".txt").write_text(f"coffee {quality}")
    for quality, name in ((62, b"latin-\xe9"), (63, b"\x1b[2J")):
        path = os.fsencode(folder) + b"/" + name
        Path(os.fsdecode(path + b".jpg")).write_bytes(jpeg(quality=quality))
        Path(os.fsdecode(path + b".txt")).write_text("an odd name")


def captions(folder: Path) -> None:
    beside: dict[str, dict[str, bytes]] = {
        "no-caption": {},
        "empty-caption": {".txt": b" \n"},
        "utf16": {".txt": "ein Fuchs".encode("utf-16")},
        "cp932": {".txt": "狐".encode("cp932")},
        "bom": {".txt": b"\xef\xbb\xbfa fox"},
        "megabyte": {".txt": b"x" * 2**20},
        "nul": {".txt": b"a\0fox"},
        "two": {".txt": b"a fox", ".caption": b"a cat"},
        "same": {".txt": b"a fox", ".caption": b"a fox\n"},
        "double": {".jpg.txt": b"a fox"},
        "shout": {".TXT": b"a fox"},
        "json-bad": {".json": b'{"caption": "a fox"'},
        "json-wordless": {".json": b'{"id": 7, "url": "x"}'},
        "json-beside": {".json": b'{"id": 7}', ".txt": b"a fox"},
        "json-texts": {".json": json.dumps({"captions": ["a fox", "a red fox"]}).encode()},
        "json-tags": {".json": json.dumps({"tags": ["fox", "red"]}).encode()},
        "in-table": {},
    }
    for quality, (name, files) in enumerate(beside.items(), start=40):
        (folder / f"{name}.jpg").write_bytes(jpeg(quality=quality))
        for suffix, content in files.items():
            (folder / f"{name}{suffix}").write_bytes(content)
    (folder / "alone.txt").write_text("no image")


def tables(folder: Path) -> None:
    rows = [
        {"file_name": "in-table.jpg", "text": "a fox of the table"},
        {"file_name": "gone.jpg", "text": "a fox that is gone"},
        {"file_name": "../secret.jpg", "text": "a fox elsewhere"},
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    (folder / "metadata.jsonl").write_text(lines + "\n{\n")

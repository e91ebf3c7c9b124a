"""Every hostile file and caption, and what becomes of it, word for word."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from eri.config import DataSource
from eri.data import images
from eri.data.folder import scan
from eri.data.items import Dataset
from eri.errors import DataError
from tests.data.hostile import LOCKED, build_hostile

UNKNOWN = (
    "not an image of a known format (JPEG, PNG, WEBP, AVIF, BMP, TIFF, GIF); "
    "save it as one of these"
)
AGAIN = "; copy it again, or save it anew"
NO_FILE = "not a regular file; remove it"
LARGE = "are more than 100 million pixels; scale it down, or raise max_megapixels"

USED = {  # size, background of transparent ones, and captions if they are not "a picture"
    "good.png": "64x64",
    "jpeg-named.png": "64x64",
    "png-named.jpg": "64x64",
    "cmyk.jpg": "64x64",
    "cmyk-profile.jpg": "64x64",
    "16-bit.png": "64x64",
    "16-bit.tif": "64x64",
    "la.png": "64x64 on #ffffff",
    "p-trns.png": "64x64 on #ffffff",
    "opaque-alpha.png": "64x64",
    **{f"exif-{orientation}.jpg": "80x64" for orientation in range(1, 5)},
    **{f"exif-{orientation}.jpg": "64x80" for orientation in range(5, 9)},
    "moving.gif": "64x64",
    "moving.webp": "64x64",
    "moving.png": "64x64",
    "pages.tif": "64x64",
    "1x1.png": "1x1",
    "1x30000.png": "1x30000",
    "bomb-81.png": "9000x9000",
    "caf\xe9.png": "64x64: coffee 60",
    "cafe\u0301.png": "64x64: coffee 61",
    "latin-\udce9.jpg": "64x64: an odd name",
    "\x1b[2J.jpg": "64x64: an odd name",
    "bom.jpg": "64x64: a fox",
    "same.jpg": "64x64: a fox",
    "double.jpg": "64x64: a fox",
    "shout.jpg": "64x64: a fox",
    "json-beside.jpg": "64x64: a fox",
    "json-texts.jpg": "64x64: a fox | a red fox",
    "json-tags.jpg": "64x64: fox, red",
    "in-table.jpg": "64x64: a fox of the table",
}

REFUSED = {
    "cut-jpg-header.jpg": "damaged: its header cannot be read" + AGAIN,
    "cut-jpg-half.jpg": "damaged: image file is truncated (150 bytes not processed)" + AGAIN,
    "cut-jpg-end.jpg": "damaged: image file is truncated (153 bytes not processed)" + AGAIN,
    "cut-png-half.png": "damaged: image file is truncated" + AGAIN,
    "cut-png-end.png": "damaged: image file is truncated" + AGAIN,
    "cut-webp-half.webp": "damaged: could not create decoder object" + AGAIN,
    "cut-avif-half.avif": "damaged: its header cannot be read" + AGAIN,
    "cut-bmp-half.bmp": "damaged: image file is truncated (165 bytes not processed)" + AGAIN,
    "cut-tif-half.tif": "damaged: its header cannot be read" + AGAIN,
    "cut-gif-half.gif": "damaged: image file is truncated (62 bytes not processed)" + AGAIN,
    "empty.png": "the file is empty; copy it again, or remove it",
    "text.jpg": UNKNOWN,
    "page.jpg": "a web page, not an image; download the image again",
    "pointer.png": "a git-lfs pointer, not the image; run `git lfs pull`",
    "photo.heic": "images of the kind .heic are not read; save it as PNG",
    "ztxt.png": "damaged: Decompressed data too large for PngImagePlugin.MAX_TEXT_CHUNK" + AGAIN,
    "32-bit.tif": "32-bit pixels (mode F); save it with 8 or 16 bits",
    "bomb-144.png": f"12000 x 12000 {LARGE}",
    "bomb-179.6.png": f"13400 x 13403 {LARGE}",
    "bomb-400.png": f"20000 x 20000 {LARGE}",
    "pipe.png": NO_FILE,
    "socket.png": NO_FILE,
    "device.png": NO_FILE,
    "dangling.png": "a link to 'nowhere.png', which cannot be opened; remove it",
    "circle.png": "a link that leads in a circle; remove it",
    "unreadable.png": "cannot be opened: Permission denied; make it readable, or remove it",
    "locked": "the folder cannot be read: Permission denied; make it readable, or remove it",
    "utf16.txt": "byte 0 is not UTF-8 (it looks like UTF-16); save it as UTF-8",
    "cp932.txt": "byte 0 is not UTF-8 (it may be an encoding of Windows, such as cp1252 or cp932); "
    "save it as UTF-8",
    "megabyte.txt": "a caption of more than 65536 bytes; shorten it",
    "nul.txt": r"holds the control character '\x00'; save it as plain text",
    "two.jpg": "different captions in two.caption, two.txt; keep one",
    "json-bad.json": "not JSON (Expecting ',' delimiter: line 1 column 20 (char 19)); mend it",
    "metadata.jsonl:3": "'../secret.jpg' leads out of the folder; name files in it, or remove the "
    "row",
    "metadata.jsonl:4": "not JSON (Expecting property name enclosed in double quotes: "
    "line 1 column 2 (char 1)); mend it",
}

WITHOUT_CAPTION = {
    "no-caption.jpg": "no caption; write no-caption.txt beside it",
    "empty-caption.jpg": "no caption (empty-caption.txt is empty); "
    "write empty-caption.txt beside it",
    "json-wordless.jpg": "no caption (json-wordless.json holds 'id', 'url' and none of caption, "
    "captions, text, tags); write json-wordless.txt beside it",
}

NOTES = [
    "captions: 33 from .txt, 1 from .caption, 2 from .json, 1 from metadata.jsonl, 3 empty",
    "links to folders, not followed (1): circle",
    "folders named like images, searched as folders (1): folder.png",
    "captions without an image (1): alone.txt",
    r"names that differ in nothing but their Unicode form (1): 'cafe\u0301.png' and 'caf\xe9.png'",
    "rows that name no image of the folder (1): metadata.jsonl:2 names gone.jpg",
    "images with a side of less than 64 pixels (2): 1x1.png, 1x30000.png",
    "mask files are here and mask: is none, so they are not used (1): good-masklabel.png",
    "JSON files without a caption, not used (1): json-beside.json",
    "transparent images, laid on #ffffff (2): la.png, p-trns.png",
    "animations or files of several pages, the first of which is used (4): moving.gif, moving.png, "
    "moving.webp, pages.tif",
    "images of which nothing is visible (1): p-trns.png",
    "the same image twice (1): good.png and png-named.jpg",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    top = build_hostile(tmp_path_factory.mktemp("hostile") / "images")
    yield top
    (top / "locked").chmod(0o700)


@pytest.fixture(autouse=True)
def locks_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions that hold for root too."""
    scandir, path_open = os.scandir, Path.open

    def denied(path: object) -> None:
        if Path(str(path)).name in LOCKED:
            raise PermissionError(13, "Permission denied", str(path))

    def guarded_scandir(path: str):
        denied(path)
        return scandir(path)

    def guarded_open(self: Path, mode: str = "r"):
        denied(self)
        return path_open(self, mode)

    monkeypatch.setattr(os, "scandir", guarded_scandir)
    monkeypatch.setattr(Path, "open", guarded_open)


def test_everything_that_is_wrong_is_told_at_once_and_in_order(folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        scan([DataSource(path=folder)])
    told = [line.replace(f"{folder}/", "") for line in caught.value.problems]
    expected = [f"{name}: {why}" for name, why in (REFUSED | WITHOUT_CAPTION).items()]
    faults = [line for line in told if not line.startswith("note: ")]
    assert sorted(faults) == sorted(expected)
    assert faults == sorted(faults, key=lambda line: line.split(":")[0])
    assert all(line.isprintable() for line in told)
    assert caught.value.exit_code == 3
    assert caught.value.what == (
        "35 of 72 images, 2 rows of caption tables and 1 folder cannot be used"
    )


def shown(dataset: Dataset) -> dict[str, str]:
    verdicts = {}
    for item in dataset.items:
        size = f"{item.width}x{item.height}"
        background = f" on {item.background}" if item.background else ""
        words = " | ".join(item.captions)
        told = "" if words == "a picture" else f": {words}"
        verdicts[item.path.name] = f"{size}{background}{told}"
    return verdicts


def test_all_the_rest_is_used(folder: Path) -> None:
    dataset = scan([DataSource(path=folder, on_bad="skip", missing_caption="empty")])
    assert shown(dataset) == USED | dict.fromkeys(WITHOUT_CAPTION, "64x64: ")
    told = [line.replace(f"{folder}/", "") for line in dataset.skipped]
    assert sorted(told) == sorted(f"{name}: {why}" for name, why in REFUSED.items())
    assert [line.replace(f"{folder}/", "") for line in dataset.notes] == NOTES


def test_a_missing_caption_is_not_a_bad_file(folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        scan([DataSource(path=folder, on_bad="skip")])
    faults = [line for line in caught.value.problems if not line.startswith("note: ")]
    told = sorted(line.replace(f"{folder}/", "") for line in faults)
    assert told == sorted(f"{name}: {why}" for name, why in WITHOUT_CAPTION.items())


def test_a_large_image_is_decoded_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    class Watched:
        def __enter__(self) -> None:
            held.append(True)

        def __exit__(self, *error: object) -> None:
            held.append(False)

    monkeypatch.setattr(images, "LARGE_ONES", Watched())
    images.decode(folder / "bomb-81.png", pixel_cap=10**8)
    assert held == [True, False]
    images.decode(folder / "good.png", pixel_cap=10**8)
    assert held == [True, False]

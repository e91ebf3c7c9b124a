from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eri.data.checked import Checks
from eri.data.items import Mask
from eri.data.masks import check_mask, read_mask
from eri.errors import DataError
from eri.files import sha256


def checked(path: Path, size: tuple[int, int] = (40, 20)) -> Mask:
    with Checks() as checks:
        return check_mask(path, size, checks, pixel_cap=10_000)


def half(size: tuple[int, int] = (40, 20)) -> Image.Image:
    """White on the left, grey on the right."""
    mask = Image.new("L", size, 255)
    mask.paste(100, (size[0] // 2, 0, *size))
    return mask


def values(mask: Image.Image) -> list[int]:
    return [int(value) for value in np.asarray(mask)[3, [3, -3]]]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_brightness_is_what_is_learned(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a-masklabel.png"
    half().convert(mode).save(path)
    mask = checked(path)
    assert mask == Mask(path=path, sha256=sha256(path), alpha=False)
    pixels = read_mask(mask, (40, 20))
    assert (pixels.mode, pixels.size, values(pixels)) == ("L", (40, 20), [255, 100])


def test_masks_of_one_and_of_sixteen_bits(tmp_path: Path) -> None:
    Image.fromarray(np.asarray(half()) > 200).save(tmp_path / "a.png")
    assert values(read_mask(checked(tmp_path / "a.png"), (40, 20))) == [255, 0]
    deep = np.asarray(half()).astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "b.png")
    assert values(read_mask(checked(tmp_path / "b.png"), (40, 20))) == [255, 100]


def test_what_is_transparent_in_a_mask_is_not_learned(tmp_path: Path) -> None:
    mask = Image.new("RGBA", (40, 20), "white")
    mask.paste((255, 255, 255, 0), (20, 0, 40, 20))
    mask.save(tmp_path / "a.png")
    assert values(read_mask(checked(tmp_path / "a.png"), (40, 20))) == [255, 0]


def test_a_mask_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # turned to the right to be upright
    half((20, 40)).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    pixels = read_mask(checked(tmp_path / "a.png", (20, 40)), (20, 40))
    assert (pixels.size, values(pixels)) == ((20, 40), [255, 100])


@pytest.mark.parametrize("size", [(20, 10), (80, 40), (41, 20), (13, 7), (1501, 751)])
def test_a_mask_of_the_same_aspect_is_scaled(tmp_path: Path, size: tuple[int, int]) -> None:
    half(size).save(tmp_path / "a.png")
    with Checks() as checks:
        mask = check_mask(tmp_path / "a.png", (40, 20), checks, pixel_cap=10**7)
    pixels = read_mask(mask, (40, 20))
    assert (pixels.size, values(pixels)) == ((40, 20), [255, 100])


@pytest.mark.parametrize("size", [(20, 40), (40, 24), (44, 20), (13, 9), (1500, 700)])
def test_a_mask_of_another_aspect_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    half(size).save(tmp_path / "a.png")
    words = f"the mask has {size[0]} x {size[1]} pixels and its image 40 x 20"
    with Checks() as checks, pytest.raises(DataError, match=words) as caught:
        check_mask(tmp_path / "a.png", (40, 20), checks, pixel_cap=10**7)
    assert caught.value.where == str(tmp_path / "a.png")


def test_a_black_mask_is_refused(tmp_path: Path) -> None:
    Image.new("L", (40, 20), 0).save(tmp_path / "a.png")
    for _ in range(2):  # found, and known
        with pytest.raises(DataError, match="wholly black"):
            checked(tmp_path / "a.png")
    dark = Image.new("L", (40, 20), 0)
    dark.putpixel((7, 7), 1)
    dark.save(tmp_path / "a.png")
    assert checked(tmp_path / "a.png")


def test_a_damaged_mask_is_refused(tmp_path: Path) -> None:
    half().save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[:-20])
    with pytest.raises(DataError, match="damaged"):
        checked(tmp_path / "a.png")


def test_a_huge_mask_is_refused(tmp_path: Path) -> None:
    Image.new("L", (400, 200), 255).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="400 x 200 are more than"):
        checked(tmp_path / "a.png")


def test_transparency_is_a_mask(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "red")
    image.putalpha(half())
    image.save(tmp_path / "a.png")
    mask = Mask(path=tmp_path / "a.png", sha256=sha256(tmp_path / "a.png"), alpha=True)
    pixels = read_mask(mask, (40, 20))
    assert (pixels.mode, values(pixels)) == ("L", [255, 100])


def test_a_mask_that_was_changed_is_refused(tmp_path: Path) -> None:
    half().save(tmp_path / "a.png")
    mask = checked(tmp_path / "a.png")
    Image.new("L", (40, 20), 9).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="changed"):
        read_mask(mask, (40, 20))

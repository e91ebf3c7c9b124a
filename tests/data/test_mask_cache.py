from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from eri.data import mask_cache
from eri.data.cuts import PLAIN, UNIT, Cut, View
from eri.data.items import Item, Mask
from eri.data.mask_cache import cache_masks, mask_in
from eri.data.shapes import Shape
from eri.errors import DataError
from tests.data.test_entries import DAMAGES, Damage

SHAPE = Shape(64, 64)


def masked(path: Path, mask: Image.Image, size: tuple[int, int] | None = None) -> Item:
    """An item with this mask; its image is never looked at."""
    mask.save(path)
    found = Mask(path=path, sha256=sha256(path.read_bytes()).hexdigest(), alpha=mask.mode != "L")
    width, height = size or mask.size
    return Item(
        path=path.with_name("absent.png"),
        captions=("x",),
        width=width,
        height=height,
        sha256="0" * 64,
        source=0,
        mask=found,
    )


def half_black(size: tuple[int, int], black: int) -> Image.Image:
    """White, and black from the left as far as `black`."""
    mask = Image.new("L", size, 255)
    mask.paste(0, (0, 0, black, size[1]))
    return mask


def masks_of(*cuts: Cut, size: tuple[int, int] = (8, 8)) -> list[Tensor]:
    paths = cache_masks(cuts, [size] * len(cuts), lambda more: None)
    found = [path and mask_in(path) for path in paths]
    assert all(isinstance(mask, Tensor) for mask in found)
    return [mask for mask in found if isinstance(mask, Tensor)]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The mask files that are read, one by one."""
    paths: list[Path] = []
    read = mask_cache.read_mask

    def noted(mask: Mask, size: tuple[int, int]) -> Image.Image:
        paths.append(mask.path)
        return read(mask, size)

    monkeypatch.setattr(mask_cache, "read_mask", noted)
    return paths


def test_a_half_black_mask_is_zeros_and_ones_and_is_flipped_with_its_image(tmp_path: Path) -> None:
    item = masked(tmp_path / "m.png", half_black((64, 64), 32))
    plain, flipped = masks_of(Cut(item, SHAPE), Cut(item, SHAPE, PLAIN._replace(flip=True)))
    assert plain.dtype == torch.float32
    assert plain.shape == (1, 8, 8)
    assert torch.equal(plain[..., :4], torch.zeros(1, 8, 4))
    assert torch.equal(plain[..., 4:], torch.ones(1, 8, 4))
    assert torch.equal(flipped, plain.flip(-1))


def test_a_latent_pixel_has_the_share_of_its_area_that_is_learned(tmp_path: Path) -> None:
    item = masked(tmp_path / "m.png", half_black((64, 64), 18))
    (mask,) = masks_of(Cut(item, SHAPE))
    assert mask[0, 0].tolist() == [0, 0, 0.75, 1, 1, 1, 1, 1]
    grey = masked(tmp_path / "grey.png", Image.new("L", (64, 64), 51))
    (mask,) = masks_of(Cut(grey, SHAPE))
    assert torch.allclose(mask, torch.full((1, 8, 8), 0.2))


def test_a_mask_is_cut_where_its_image_is(tmp_path: Path) -> None:
    item = masked(tmp_path / "m.png", half_black((128, 64), 64))
    views = [View(across=0), PLAIN, View(across=UNIT)]
    left, middle, right = masks_of(*(Cut(item, SHAPE, view) for view in views))
    assert torch.equal(left, torch.zeros(1, 8, 8))
    assert torch.equal(right, torch.ones(1, 8, 8))
    assert middle[0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_mask_is_scaled_with_its_image_and_stays_in_0_to_1(tmp_path: Path) -> None:
    item = masked(tmp_path / "m.png", half_black((100, 100), 50), size=(200, 200))
    (mask,) = masks_of(Cut(item, SHAPE))
    assert mask.min() >= 0
    assert mask.max() <= 1
    assert torch.allclose(mask[0, 0], torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1]), atol=0.02)


def test_transparency_is_a_mask(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (64, 64), (9, 9, 9, 255))
    picture.paste((9, 9, 9, 0), (0, 0, 64, 32))
    (mask,) = masks_of(Cut(masked(tmp_path / "m.png", picture), SHAPE))
    assert torch.equal(mask[0, :, 0], torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1]))


def test_an_image_without_a_mask_has_none(tmp_path: Path) -> None:
    item = masked(tmp_path / "m.png", half_black((64, 64), 32))
    cuts = [Cut(replace(item, mask=None), SHAPE), Cut(item, SHAPE)]
    counted: list[int] = []
    without, with_one = cache_masks(cuts, [(8, 8)] * 2, counted.append)
    assert without is None
    assert with_one is not None
    assert counted == [1]


CHANGES: dict[str, tuple[dict[str, Any], bool]] = {
    "flip": ({"view": PLAIN._replace(flip=True)}, True),
    "crop": ({"view": PLAIN._replace(down=0)}, True),
    "zoom": ({"view": PLAIN._replace(zoom=100)}, True),
    "shape": ({"shape": Shape(32, 32)}, True),
    "colors": ({"view": PLAIN._replace(brightness=1, contrast=2, saturation=3)}, False),
}


@pytest.mark.parametrize(("change", "anew"), CHANGES.values(), ids=CHANGES.keys())
def test_another_geometry_is_another_mask_and_another_color_is_not(
    tmp_path: Path, made: list[Path], change: dict[str, Any], anew: bool
) -> None:
    cuts = [
        Cut(masked(tmp_path / f"{n}.png", half_black((64, 96), 10 * n)), SHAPE) for n in range(3)
    ]
    masks_of(*cuts)
    masks_of(*cuts)
    assert len(made) == 3
    made.clear()
    masks_of(cuts[0], replace(cuts[1], **change), cuts[2])
    assert made == [tmp_path / "1.png"] * anew


def test_an_edited_mask_is_made_again_and_another_latent_size_is_its_own(
    tmp_path: Path, made: list[Path]
) -> None:
    item = masked(tmp_path / "m.png", half_black((64, 64), 16))
    (before,) = masks_of(Cut(item, SHAPE))
    (coarse,) = masks_of(Cut(item, SHAPE), size=(4, 4))
    assert coarse[0, 0].tolist() == [0, 1, 1, 1]
    edited = masked(tmp_path / "m.png", half_black((64, 64), 32))
    (after,) = masks_of(Cut(edited, SHAPE))
    assert len(made) == 3
    assert not torch.equal(before, after)
    same_image = replace(edited, sha256="1" * 64, path=tmp_path / "another.png")
    masks_of(Cut(same_image, SHAPE))
    assert len(made) == 3


def test_a_mask_that_changed_since_the_check_is_refused(tmp_path: Path) -> None:
    item = masked(tmp_path / "m.png", half_black((64, 64), 16))
    half_black((64, 64), 32).save(tmp_path / "m.png")
    with pytest.raises(DataError, match=r"the file changed.*m\.png"):
        masks_of(Cut(item, SHAPE))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_mask_is_made_again(tmp_path: Path, made: list[Path], damage: Damage) -> None:
    cuts: Sequence[Cut] = [Cut(masked(tmp_path / "m.png", half_black((64, 64), 16)), SHAPE)]
    (path,) = cache_masks(cuts, [(8, 8)], lambda more: None)
    assert path is not None
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert mask_in(path) is None
    cache_masks(cuts, [(8, 8)], lambda more: None)
    assert path.read_bytes() == whole
    assert len(made) == 2

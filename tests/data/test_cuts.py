import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from eri.config import DataSource
from eri.data.cuts import PLAIN, UNIT, View, fit, geometry, size_ids, views
from eri.data.shapes import Shape


def test_a_scaled_image_covers_its_shape_and_no_more() -> None:
    rng = random.Random(2)
    for _ in range(500):
        width, height = rng.randint(1, 4000), rng.randint(1, 4000)
        shape = Shape(rng.randint(1, 16) * 64, rng.randint(1, 16) * 64)
        scaled, top, left = geometry(width, height, shape)
        assert scaled.width >= shape.width
        assert scaled.height >= shape.height
        assert shape.width == scaled.width or shape.height == scaled.height
        assert 0 <= 2 * top <= scaled.height - shape.height
        assert 0 <= 2 * left <= scaled.width - shape.width
        scale = max(shape.width / width, shape.height / height)
        assert abs(scaled.width - width * scale) <= 0.5 + 1e-9
        assert abs(scaled.height - height * scale) <= 0.5 + 1e-9


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(301, 200), (200, 301), (128, 128), (700, 97), (65, 64)])
def test_the_cut_is_that_of_scaling_first(size: tuple[int, int]) -> None:
    image, shape = noise(*size), Shape(64, 128)
    scaled, top, left = geometry(*size, shape)
    whole = image.resize((scaled.width, scaled.height), Image.Resampling.LANCZOS)
    expected = np.asarray(whole)[top : top + 64, left : left + 128].astype(int)
    fitted = fit(image, shape)
    assert fitted.shape == (3, 64, 128)
    assert fitted.dtype == torch.uint8
    assert np.abs(fitted.permute(1, 2, 0).numpy() - expected).max() <= 2


def marked(width: int, height: int, column: int, row: int) -> Image.Image:
    """Black, with a white disc about a point."""
    image = Image.new("RGB", (width, height))
    radius = min(width, height) / 20
    corners = (column - radius, row - radius, column + radius, row + radius)
    ImageDraw.Draw(image).ellipse(corners, fill="white")
    return image


def found(pixels: torch.Tensor) -> tuple[float, float]:
    """Row and column of the light's centre."""
    light = pixels[0].double()
    rows, columns = torch.arange(light.shape[0]) + 0.5, torch.arange(light.shape[1]) + 0.5
    row, column = light.sum(1) @ rows.double(), light.sum(0) @ columns.double()
    return (row / light.sum()).item(), (column / light.sum()).item()


def kohya_corner(width: int, height: int, shape: Shape) -> tuple[float, float]:
    """Top and left as kohya's scripts tell them: of an image that fits inside the shape."""
    scale = min(shape.height / height, shape.width / width)
    return (shape.height - height * scale) / 2, (shape.width - width * scale) / 2


VIEWS = [
    PLAIN,
    View(flip=True),
    View(zoom=UNIT // 4, down=450, across=400),
    View(flip=True, zoom=UNIT // 8, down=600, across=450),
    View(brightness=UNIT // 2),
]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((512, 1024), Shape(256, 256)),
        ((1024, 512), Shape(256, 256)),
        ((700, 500), Shape(192, 320)),
        ((300, 500), Shape(192, 320)),
        ((90, 200), Shape(128, 128)),
    ],
)
def test_the_size_ids_are_where_the_picture_really_was_cut(
    size: tuple[int, int], shape: Shape, view: View
) -> None:
    width, height = size
    column, row = 0.45 * width, 0.55 * height
    there = found(fit(marked(width, height, int(column), int(row)), shape, view))
    tall, wide, top, left, *target = size_ids(width, height, shape, view)
    assert target == [*shape]
    scale = geometry(width, height, shape, view).scaled.height / tall
    column = width - int(column) if view.flip else column  # in the image as the net sees it
    assert (wide, tall) == size
    assert there == pytest.approx((int(row) * scale - top, int(column) * scale - left), abs=1.5)
    other_top, other_left = kohya_corner(width, height, shape)
    off = (int(row) * scale - other_top, int(column) * scale - other_left)
    assert there != pytest.approx(off, abs=8)  # the comparison notices another corner


def test_the_size_ids_of_the_published_example() -> None:
    assert size_ids(512, 1024, Shape(1024, 1024)) == (1024, 512, 512, 0, 1024, 1024)


def test_an_image_of_the_shape_is_left_as_it_is() -> None:
    image = noise(128, 64)
    pixels = fit(image, Shape(64, 128))
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))


def test_a_very_long_image_is_never_scaled_whole() -> None:
    assert fit(Image.new("RGB", (30_000, 1), "red"), Shape(64, 128))[0].min() == 255


def test_a_source_that_asks_for_nothing_has_its_images_as_they_are() -> None:
    assert views("ab" * 32, DataSource(path=Path("a"))) == (PLAIN,)


def test_a_flip_makes_two_of_each() -> None:
    assert views("ab" * 32, DataSource(path=Path("a"), flip=True)) == (PLAIN, View(flip=True))
    drawn = views("ab" * 32, DataSource(path=Path("a"), flip=True, color=0.1, variants=3))
    assert len(drawn) == 6
    assert drawn[1::2] == tuple(view._replace(flip=True) for view in drawn[::2])


def test_versions_are_drawn_from_the_image_alone_and_within_their_limits() -> None:
    source = DataSource(path=Path("a"), crop_jitter=0.2, color=0.1, variants=200)
    drawn = views("ab" * 32, source)
    assert drawn == views("ab" * 32, source)
    assert drawn != views("cd" * 32, source)
    assert drawn[:4] == views("ab" * 32, source.model_copy(update={"variants": 4}))
    assert len(set(drawn)) == 200
    zooms = [view.zoom for view in drawn]
    assert min(zooms) < 0.02 * UNIT and 0.22 * UNIT < max(zooms) <= 0.25 * UNIT  # 1 / 0.8 = 1.25
    for name in ("brightness", "contrast", "saturation"):
        factors = [getattr(view, name) / UNIT for view in drawn]
        assert 0.899 <= min(factors) < 0.92 and 1.08 < max(factors) <= 1.101
    assert {view.zoom for view in views("ab" * 32, DataSource(path=Path("a"), color=0.1))} == {0}


def test_zooming_never_enlarges_an_image() -> None:
    zoomed = View(zoom=UNIT)
    assert geometry(256, 256, Shape(128, 128), zoomed).scaled == (256, 256)
    assert geometry(150, 150, Shape(128, 128), zoomed).scaled == (150, 150)
    assert geometry(100, 100, Shape(128, 128), zoomed).scaled == (128, 128)
    assert geometry(1000, 1000, Shape(128, 128), View(zoom=UNIT // 2)).scaled == (192, 192)


def test_a_mirrored_cut_is_the_cut_mirrored() -> None:
    image = noise(300, 200)
    view = View(zoom=300, down=10, across=900)
    plain, mirrored = (fit(image, Shape(64, 128), view._replace(flip=f)) for f in (False, True))
    assert torch.equal(mirrored, plain.flip(-1))
    assert not torch.equal(mirrored, plain)


def test_colors_change_and_those_of_a_mask_do_not() -> None:
    image = noise(128, 64)
    view = View(brightness=UNIT // 2)
    plain, dark = fit(image, Shape(64, 128)), fit(image, Shape(64, 128), view)
    assert dark.float().mean().item() == pytest.approx(plain.float().mean().item() / 2, rel=0.02)
    mask = image.convert("L")
    assert fit(mask, Shape(64, 128)).shape == (1, 64, 128)
    assert torch.equal(fit(mask, Shape(64, 128), view), fit(mask, Shape(64, 128)))

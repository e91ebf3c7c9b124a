import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from eri.data.cuts import fit, geometry, size_ids
from eri.data.folder import Item
from eri.data.shapes import Shape, assign, shapes


def item(width: int, height: int, source: int = 0) -> Item:
    name = Path(f"{width}x{height}.png")
    return Item(path=name, captions=("",), width=width, height=height, sha256="", source=source)


def shape_of(width: int, height: int, resolution: int = 512) -> Shape:
    return assign([item(width, height)], [resolution], 64).shapes[0]


@pytest.mark.parametrize("resolution", [64, 128, 200, 512, 768, 1024, 1536])
def test_shapes_keep_their_limits(resolution: int) -> None:
    found = shapes(resolution, 64)
    side = resolution // 64 * 64
    assert found[0] == (side, side)
    assert len(set(found)) == len(found)
    for height, width in found:
        assert height % 64 == 0
        assert width % 64 == 0
        assert height * width <= resolution**2
        assert max(height, width) <= 2 * min(height, width)
        assert Shape(width, height) in found


def test_the_shapes_of_sdxl_are_those_it_was_trained_on() -> None:
    widths = {(shape.width, shape.height) for shape in shapes(1024, 64)}
    assert {(1024, 1024), (1152, 896), (1216, 832), (1344, 768), (896, 1152)} <= widths


def test_a_resolution_below_the_least_side_is_refused() -> None:
    with pytest.raises(ValueError, match="smaller than 64"):
        shapes(63, 64)


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((512, 512), (512, 512)),
        ((4000, 4000), (512, 512)),
        ((4000, 3000), (448, 576)),
        ((3000, 4000), (576, 448)),
        ((1920, 1080), (384, 640)),
        ((4000, 1000), (320, 640)),
        ((300, 300), (256, 256)),
        ((511, 511), (448, 448)),
        ((100, 100), (64, 64)),
        ((20, 20), (64, 64)),
        ((30000, 1), (64, 64)),
        ((1, 30000), (64, 64)),
    ],
)
def test_an_image_takes_the_shape_of_its_aspect(
    size: tuple[int, int], shape: tuple[int, int]
) -> None:
    assert shape_of(*size) == shape


def test_no_shape_is_nearer_and_nothing_is_enlarged_without_need() -> None:
    rng = random.Random(0)
    for _ in range(300):
        width, height = rng.randint(64, 3000), rng.randint(64, 3000)
        chosen = shape_of(width, height)
        assert chosen.width <= width
        assert chosen.height <= height
        if width >= 1024 and height >= 1024:
            off = [abs(math.log(width * s.height / (height * s.width))) for s in shapes(512, 64)]
            mine = abs(math.log(width * chosen.height / (height * chosen.width)))
            assert mine <= min(off) + 1e-12


def test_turned_images_take_turned_shapes() -> None:
    rng = random.Random(1)
    for _ in range(200):
        width, height = rng.randint(1, 2000), rng.randint(1, 2000)
        chosen = shape_of(width, height)
        assert shape_of(height, width) == (chosen.width, chosen.height)


def test_small_images_are_pointed_out() -> None:
    items = [item(512, 512), item(300, 300), item(20, 20), item(600, 300, source=1)]
    found = assign(items, [512, 256], 64)
    assert found.shapes == ((512, 512), (256, 256), (64, 64), (128, 256))
    assert found.notes == (
        "images smaller than the resolution, kept at their size (1): 300x300.png",
        "images smaller than the smallest shape, enlarged (1): 20x20.png",
    )


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
    assert fitted.pixels.shape == (3, 64, 128)
    assert fitted.pixels.dtype == torch.uint8
    assert (fitted.original, fitted.top, fitted.left) == ((size[1], size[0]), top, left)
    assert np.abs(fitted.pixels.permute(1, 2, 0).numpy() - expected).max() <= 2


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
    size: tuple[int, int], shape: Shape
) -> None:
    width, height = size
    column, row = 0.45 * width, 0.55 * height
    there = found(fit(marked(width, height, int(column), int(row)), shape).pixels)
    tall, wide, top, left, *target = size_ids(width, height, shape)
    scale = max(target[0] / tall, target[1] / wide)
    assert (wide, tall) == size
    assert there == pytest.approx((int(row) * scale - top, int(column) * scale - left), abs=1.5)
    other_top, other_left = kohya_corner(width, height, shape)
    off = (int(row) * scale - other_top, int(column) * scale - other_left)
    assert there != pytest.approx(off, abs=8)  # the comparison notices another corner


def test_the_size_ids_of_the_published_example() -> None:
    assert size_ids(512, 1024, Shape(1024, 1024)) == (1024, 512, 512, 0, 1024, 1024)


def test_an_image_of_the_shape_is_left_as_it_is() -> None:
    image = noise(128, 64)
    pixels = fit(image, Shape(64, 128)).pixels
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))


def test_a_very_long_image_is_never_scaled_whole() -> None:
    assert fit(Image.new("RGB", (30_000, 1), "red"), Shape(64, 128)).pixels[0].min() == 255

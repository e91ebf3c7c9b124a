import math
import random
from pathlib import Path

import pytest

from eri.config import DataSource
from eri.data.items import Item
from eri.data.shapes import Assignment, Shape, assign, crop_loss, shapes
from eri.errors import ConfigError

SOURCES = (DataSource(path=Path("a")), DataSource(path=Path("b")))


def item(width: int, height: int, source: int = 0) -> Item:
    name = Path(f"{width}x{height}.png")
    return Item(path=name, captions=("",), width=width, height=height, sha256="", source=source)


def shape_of(width: int, height: int, resolution: int = 512) -> Shape:
    return placed([item(width, height)], resolution).shapes[0]


def placed(items: list[Item], resolution: int = 512, batch_size: int = 1) -> Assignment:
    return assign(items, SOURCES, [resolution, 256], step=64, batch_size=batch_size)


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
    found = placed(items)
    assert found.shapes == ((512, 512), (256, 256), (64, 64), (128, 256))
    assert found.notes == (
        "images smaller than the resolution, not enlarged (1): 300x300.png",
        "images enlarged (1): 20x20.png",
    )


def test_an_image_that_is_asked_to_be_enlarged_is() -> None:
    sources = [DataSource(path=Path("a"), upscale=True)]
    found = assign([item(300, 200), item(600, 600)], sources, [512], step=64)
    assert found.shapes == ((384, 640), (512, 512))
    assert found.notes == ("images enlarged (1): 300x200.png",)


def test_no_image_has_much_more_pixels_than_its_shape() -> None:
    for side in range(64, 1024):
        shape = shape_of(side, side, 1024)
        assert shape.height <= side < max(8 * shape.height // 7 + 64, 2 * 64 + 1)


SQUARES = [item(1024, 1024)] * 4


@pytest.mark.parametrize(
    ("few", "joins"),
    [
        ([item(1300, 1150)] * 3, False),  # 1.13: nothing is cut off, the square would cut 12 %
        ([item(1188, 1100)] * 3, True),  # 1.08: 4.7 % are cut off, the square cuts 7.4 %
        ([item(1188, 1100)] * 4, False),  # they fill a batch
        ([item(1188, 1100), item(1300, 1150)], False),  # it would cost one of them too much
        ([item(1100, 1010)] * 3, False),  # the square would enlarge them
    ],
)
def test_images_too_few_for_a_batch_join_their_neighbours(few: list[Item], joins: bool) -> None:
    own = [shape_of(image.width, image.height, 1024) for image in few]
    found = placed([*SQUARES, *few], 1024, batch_size=4)
    assert own == [(960, 1088)] * len(few)
    assert found.shapes == (*[(1024, 1024)] * 4, *([(1024, 1024)] * len(few) if joins else own))
    assert found.joined == (len(few) if joins else 0)


def test_repeats_can_fill_a_batch() -> None:
    sources = [DataSource(path=Path("a")), DataSource(path=Path("b"), repeats=2)]
    few = [item(1188, 1100, source=1)] * 3
    found = assign([*SQUARES, *few], sources, [1024, 1024], step=64, batch_size=4)
    assert found.joined == 3  # twice each of three needs more than one batch, and fills not two
    four = assign([*SQUARES, *few, *few[:1]], sources, [1024, 1024], step=64, batch_size=4)
    assert four.joined == 0


def test_no_image_joins_a_much_smaller_resolution() -> None:
    found = placed([item(256, 256)] * 4 + [item(512, 512)], batch_size=4)
    assert found.joined == 0


def test_no_image_joins_a_larger_resolution_than_its_folder_has() -> None:
    sources = [DataSource(path=Path("a")), DataSource(path=Path("b"))]
    items = [*SQUARES, *SQUARES, item(2000, 2000, source=1)]
    found = assign(items, sources, [1024, 512], step=64, batch_size=4)
    assert found.shapes[-1] == (512, 512)
    other = assign(
        [*SQUARES[:1], *[item(2000, 2000, source=1)] * 3],
        sources,
        [1024, 512],
        step=64,
        batch_size=4,
    )
    assert other.shapes == ((1024, 1024), *[(512, 512)] * 3)


@pytest.mark.parametrize("resolution", [512, 768, 1024, 1280])
@pytest.mark.parametrize("step", [32, 64])
def test_joining_never_costs_an_image_more_than_the_limit(resolution: int, step: int) -> None:
    rng = random.Random(resolution)
    sources = [DataSource(path=Path("a"))]
    for _ in range(20):
        sizes = [(rng.randint(400, 6000), rng.randint(400, 6000)) for _ in range(12)]
        items = [item(*size) for size in sizes]
        own = assign(items, sources, [resolution], step=step).shapes
        joined = assign(items, sources, [resolution], step=step, batch_size=6)
        for (width, height), alone, shape in zip(sizes, own, joined.shapes, strict=True):
            more = crop_loss(width, height, shape) - crop_loss(width, height, alone)
            assert more <= 0.05
            assert 0.8 * alone.area <= shape.area <= resolution**2


def test_a_resolution_that_the_model_cannot_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="is 64 pixels, and the model needs 128 at least"):
        assign([item(200, 200)], SOURCES, [64, 512], step=128)

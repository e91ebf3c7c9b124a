from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from eri.config import DataSource, Train
from eri.data import Batches, Item, Shape
from eri.run.cache_space import CacheSpace
from eri.run.dataset import Images
from eri.run.footprint import Footprint
from eri.run.image_set import ImageSet
from eri.run.memory_plan import MemoryPlan
from eri.run.plan_text import (
    cache_lines,
    image_lines,
    memory_lines,
    slower_lines,
    time_line,
    training_lines,
)
from eri.run.rates import Rate

GIB = 2**30
SQUARE = Shape(64, 64)


def item(width: int, height: int, source: int = 0) -> Item:
    return Item(
        path=Path("x.png"),
        captions=("x",),
        width=width,
        height=height,
        sha256="0" * 64,
        source=source,
    )


def planned(
    sizes: list[tuple[int, int]], shapes: list[Shape], *, batch_size: int = 4, **more: object
) -> list[str]:
    sources = (DataSource(path=Path("a")), DataSource(path=Path("b"), regularization=True))
    items = tuple(item(*size) for size in sizes)
    train = ImageSet(items, tuple(shapes), sources, **more)  # type: ignore[arg-type]
    batches = Batches(shapes, [2] * len(shapes), batch_size=batch_size, seed=0)
    return image_lines(Images(train, ImageSet()), batches)


def test_the_table_says_what_each_shape_has_and_loses() -> None:
    wide = Shape(64, 128)
    lines = planned([(64, 64), (80, 64), (64, 64), (256, 128)], [SQUARE] * 3 + [wide])
    assert lines == [
        "images   4, 0 held out",
        "         shape       images  an epoch  batches   cut off: mean, worst",
        "         64x64            3         6        2   6.7%, 20.0%",
        "         128x64           1         2        2   0.0%, 0.0%",
    ]


def test_batches_that_carry_over_are_told_as_the_mean() -> None:
    lines = planned([(64, 64)] * 5, [SQUARE] * 5)
    assert lines[2].split()[1:4] == ["5", "10", "2.5"]


def test_a_long_table_is_cut_at_its_small_end() -> None:
    shapes = [Shape(64, 64 * number) for number in range(1, 16)]
    shapes += [shapes[-1]]
    lines = planned([(shape.width, shape.height) for shape in shapes], shapes)
    assert len(lines) == 12
    assert lines[2].split()[:2] == ["960x64", "2"]
    assert lines[-1].strip() == "and 6 more shapes, of 6 images"


def test_what_is_special_about_the_images_is_told() -> None:
    assert planned([(64, 64)] * 2, [SQUARE] * 2, joined=1)[0] == (
        "images   2, 1 joined the shape of their neighbours, 0 held out"
    )
    sources = (DataSource(path=Path("a"), regularization=True),)
    train = ImageSet((item(64, 64),), (SQUARE,), sources)
    batches = Batches([SQUARE], batch_size=1, seed=0)
    line = image_lines(Images(train, train), batches)[0]
    assert line == "images   1, 1 of them for regularization, 1 held out"


def lines_of(count: int, images: int | None = None, **settings: object) -> list[str]:
    train = Train.model_validate(settings)
    batches = Batches([SQUARE] * count, batch_size=4, seed=0, epochs=train.epochs)
    steps = {"auto": 1525}.get(str(train.steps), train.steps)
    if batches.total is not None:
        steps = -(-batches.total // train.accumulate)
    assert isinstance(steps, int)
    learned = range(images or count)
    return [line.strip() for line in training_lines(train, batches, steps, learned)]


def test_epochs_are_told_with_their_arithmetic() -> None:
    assert lines_of(61, epochs=5) == [
        "training 77 steps of up to 4 images, lr 0.0001 constant",
        "5 epochs x 61 samples = 305 samples: 77 batches of up to 4 -> 77 steps",
    ]
    assert lines_of(61, epochs=5, accumulate=2)[1].endswith("-> 39 steps of up to 2 batches")
    assert lines_of(4, epochs=1)[1].startswith("1 epoch x 4 samples")


def test_auto_is_told_with_its_arithmetic_and_its_origin() -> None:
    first, why, origin = lines_of(61)
    assert first == "training 1525 steps of up to 4 images, 100.0 epochs of 61 samples, " + (
        "lr 0.0001 constant"
    )
    assert why == "auto: 61 images x 100 views / 4 a step = 1525, at least 500 and at most 3000;"
    assert origin == "guides and presets of other trainers take 1000 to 3000"
    assert "auto: 3 images x 100 views / 0.1967 of them a step = 1525," in lines_of(61, images=3)[1]


def test_auto_is_told_with_the_batches_that_are_not_full() -> None:
    batches = Batches([SQUARE] * 30 + [Shape(64, 128)] * 2, batch_size=3, seed=0)
    lines = training_lines(Train(batch_size=3), batches, 1100, range(32))
    assert "auto: 32 images x 100 views / 2.909 of them a step = 1100, at least" in lines[1]


def test_the_warm_up_is_told() -> None:
    assert lines_of(8, steps=10, warmup=3, schedule="cosine")[0].endswith(
        "lr 0.0001 cosine, after a warm-up of 3 steps"
    )
    assert lines_of(8, steps=10, warmup=10)[0].endswith(
        "lr 0.0001 constant, never reached: the warm-up is 10 steps long"
    )


def test_a_number_of_steps_needs_no_explanation() -> None:
    assert lines_of(8, steps=10) == [
        "training 10 steps of up to 4 images, 5.0 epochs of 8 samples, lr 0.0001 constant"
    ]


LARGE = Shape(1024, 1024)
PLAN = MemoryPlan(
    mode="auto",
    micro=2,
    lean=True,
    recompute="feed-forward",
    needed=Footprint(weights=5 * GIB, adapter=GIB // 2, activations=3 * GIB),
    free=12 * GIB,
)


def test_memory_is_told_by_how_a_batch_is_run_and_what_takes_it() -> None:
    assert PLAN.peak is not None
    peak = f"{PLAN.peak / GIB:.1f}"
    assert memory_lines(PLAN, 4, LARGE) == [
        f"memory   about {peak} GiB of 12.0 GiB free: 4 images of 1024x1024 as 2 x 2, "
        "feed-forward computed again",
        "         5.0 GiB for the U-Net, 512 MiB for the adapter, 3.0 GiB for a part",
    ]


@pytest.mark.parametrize(
    ("images", "micro", "recompute", "told"),
    [
        (1, 1, "nothing", "1 image of 1024x1024"),
        (4, 4, "nothing", "4 images of 1024x1024 at once"),
        (4, 1, "blocks", "4 images of 1024x1024 as 4 x 1, blocks computed again"),
        (7, 4, "projections", "7 images of 1024x1024 in 2 parts of at most 4, projections"),
        (5, 2, "nothing", "5 images of 1024x1024 in 3 parts of at most 2"),
    ],
)
def test_every_way_has_its_words(images: int, micro: int, recompute: str, told: str) -> None:
    plan = replace(PLAN, micro=micro, recompute=recompute)
    line, _ = memory_lines(plan, images, LARGE)
    assert line.endswith(told) if recompute != "projections" else told in line


def test_without_a_gpu_only_what_is_needed_is_told() -> None:
    plan = replace(PLAN, micro=4, recompute="nothing", free=None)
    assert memory_lines(plan, 4, LARGE) == [
        "memory   about 8.5 GiB beside the program itself: 4 images of 1024x1024 at once",
        "         5.0 GiB for the U-Net, 512 MiB for the adapter, 3.0 GiB for these",
    ]
    assert memory_lines(replace(plan, needed=None), 4, LARGE) == []


@pytest.mark.parametrize(
    ("mode", "micro", "recompute", "advice"),
    [
        ("fast", 4, "nothing", "train.memory: auto finds a way that fits, if there is one"),
        ("auto", 1, "blocks", "a smaller data.resolution or adapter.rank takes less"),
        ("small", 1, "blocks", "a smaller data.resolution or adapter.rank takes less"),
    ],
)
def test_a_way_that_may_not_fit_is_warned_of(
    mode: str, micro: int, recompute: str, advice: str
) -> None:
    plan = replace(PLAN, mode=mode, micro=micro, recompute=recompute, free=8 * GIB)
    assert memory_lines(plan, 4, LARGE)[2:] == [
        f"warning: this is more than is free and may fail; {advice}"
    ]


def test_what_makes_a_run_slower_is_told() -> None:
    assert slower_lines([]) == []
    assert slower_lines(["a", "b"]) == ["slower   a", "slower   b"]


@pytest.mark.parametrize(
    ("samples", "told"),
    [(3768, "4 min"), (15, "1 s"), (400, "25 s"), (120_000, "2 h 7 min")],
)
def test_time_is_told_from_what_was_measured(samples: int, told: str) -> None:
    line = time_line(samples, Rate(15.7, date(2026, 1, 2)))
    assert line == (
        f"time     about {told} at 15.7 images/s (measured here on 2026-01-02), previews left out"
    )


def test_time_is_unknown_before_anything_was_measured() -> None:
    assert time_line(100, None) == "time     is known after the first steps"


def test_the_cache_is_told_by_what_is_missing() -> None:
    space = CacheSpace(latents=61, missing=1, texts=60, needed=20 * 2**20, free=3 * GIB)
    told = "cache    1 of 61 latents and at most 60 texts are missing: 20 MiB more"
    assert cache_lines(space) == [f"{told} of 3.0 GiB free"]
    short = CacheSpace(latents=61, missing=1, texts=60, needed=20 * 2**20, free=19 * 2**20)
    assert cache_lines(short) == [told, "warning: only 19 MiB are free for the cache"]
    none = CacheSpace(latents=61, missing=0, texts=0, needed=0, free=0)
    assert cache_lines(none) == ["cache    all 61 latents and their texts are there"]

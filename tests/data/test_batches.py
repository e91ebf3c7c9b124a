import random
from collections import Counter

import pytest

from eri.data.batches import Batches
from eri.data.shapes import Shape

SQUARE, WIDE, TALL = Shape(512, 512), Shape(448, 576), Shape(576, 448)


def ragged(seed: int) -> tuple[list[Shape], int]:
    rng = random.Random(seed)
    shapes = [Shape(64 * rng.randint(1, 9), 64) for _ in range(rng.randint(1, 50))]
    return shapes, rng.randint(1, 8)


@pytest.mark.parametrize("seed", range(20))
def test_every_epoch_shows_every_image_once_and_shapes_never_mix(seed: int) -> None:
    shapes, batch_size = ragged(seed)
    batches = Batches(shapes, batch_size=batch_size, seed=seed)
    for epoch in range(3):
        first = epoch * batches.steps_per_epoch
        steps = [batches.batch(first + step) for step in range(batches.steps_per_epoch)]
        seen = Counter(index for batch in steps for index in batch.indices)
        assert seen == Counter(range(len(shapes)))
        for batch in steps:
            assert 1 <= len(batch.indices) <= batch_size
            assert len({shapes[index] for index in batch.indices}) == 1
        samples = [sample for batch in steps for sample in batch.samples]
        assert samples == list(range(epoch * len(shapes), (epoch + 1) * len(shapes)))


@pytest.mark.parametrize("seed", range(10))
def test_at_most_one_batch_of_a_shape_is_short(seed: int) -> None:
    shapes, batch_size = ragged(seed)
    batches = Batches(shapes, batch_size=batch_size, seed=seed)
    steps = [batches.batch(step) for step in range(batches.steps_per_epoch)]
    short = Counter(shapes[b.indices[0]] for b in steps if len(b.indices) < batch_size)
    assert all(count == 1 for count in short.values())


@pytest.mark.parametrize("seed", range(5))
def test_a_batch_is_a_function_of_seed_and_step(seed: int) -> None:
    shapes, batch_size = ragged(seed)
    straight = Batches(shapes, batch_size=batch_size, seed=seed)
    expected = [straight.batch(step) for step in range(100)]
    steps = list(range(100))
    random.Random(seed).shuffle(steps)
    jumping = Batches(shapes, batch_size=batch_size, seed=seed)
    assert {step: jumping.batch(step) for step in steps} == dict(enumerate(expected))
    assert Batches(shapes, batch_size=batch_size, seed=seed).batch(99) == expected[99]


def test_seeds_and_epochs_have_their_own_order() -> None:
    shapes = [SQUARE] * 40
    orders = {
        Batches(shapes, batch_size=40, seed=seed).batch(step).indices
        for seed in range(3)
        for step in range(3)
    }
    assert len(orders) == 9


def test_shapes_alternate_within_an_epoch() -> None:
    shapes = [SQUARE] * 40 + [WIDE] * 40
    batches = Batches(shapes, batch_size=4, seed=0)
    order = [shapes[batches.batch(step).indices[0]] for step in range(20)]
    assert order != sorted(order)
    assert order != sorted(order, reverse=True)


def test_steps_are_counted_with_the_short_batches() -> None:
    shapes = [SQUARE] * 5 + [WIDE] * 4 + [TALL]
    assert Batches(shapes, batch_size=4, seed=0).steps_per_epoch == 2 + 1 + 1


def test_every_image_meets_every_other() -> None:
    batches = Batches([SQUARE] * 8, batch_size=4, seed=0)
    met = {
        frozenset((one, other))
        for step in range(100)
        for one in batches.batch(step).indices
        for other in batches.batch(step).indices
        if one < other
    }
    assert len(met) == 28


@pytest.mark.parametrize(("shapes", "batch_size"), [([], 4), ([SQUARE], 0)])
def test_nothing_to_batch_is_refused(shapes: list[Shape], batch_size: int) -> None:
    with pytest.raises(ValueError, match="images in batches of"):
        Batches(shapes, batch_size=batch_size, seed=0)


def test_the_order_of_today_stays() -> None:
    batches = Batches([SQUARE] * 5 + [WIDE] * 3, batch_size=2, seed=7)
    assert [batches.batch(step).indices for step in (0, 1, 4, 1000)] == [
        (6,),
        (0,),
        (5, 7),
        (4, 3),
    ]

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from eri.data.batches import Batch, Batches
from eri.data.shapes import Shape

SQUARE, WIDE, TALL = Shape(512, 512), Shape(448, 576), Shape(576, 448)
SEEDS = range(40)


def ragged(seed: int) -> tuple[list[Shape], list[int], int]:
    """Shapes, repeats and a batch size: from one image to many, from few repeats to more."""
    rng = random.Random(seed)
    shapes = [Shape(64 * rng.randint(1, rng.randint(1, 9)), 64) for _ in range(rng.randint(1, 60))]
    most = rng.randint(1, 5)
    return shapes, [rng.randint(1, most) for _ in shapes], rng.randint(1, 9)


def run(
    shapes: Sequence[Shape], repeats: Sequence[int], batch_size: int, epochs: int, seed: int = 0
) -> list[Batch]:
    batches = Batches(shapes, repeats, batch_size=batch_size, seed=seed, epochs=epochs)
    assert batches.total is not None
    return [batches.batch(number) for number in range(batches.total)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_a_run_shows_every_image_exactly_as_often_as_stated(seed: int, epochs: int) -> None:
    shapes, repeats, batch_size = ragged(seed)
    seen = Counter(n for batch in run(shapes, repeats, batch_size, epochs) for n in batch.indices)
    assert seen == Counter({n: epochs * count for n, count in enumerate(repeats)})


@pytest.mark.parametrize("seed", SEEDS)
def test_no_batch_mixes_shapes_or_shows_an_image_twice(seed: int) -> None:
    shapes, repeats, batch_size = ragged(seed)
    batches = run(shapes, repeats, batch_size, 4)
    for batch in batches:
        assert 1 <= len(batch.indices) <= batch_size
        assert len({shapes[index] for index in batch.indices}) == 1
        assert len(set(batch.indices)) == len(batch.indices)
    numbers = [sample for batch in batches for sample in batch.samples]
    assert numbers == list(range(4 * sum(repeats)))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_bucket_that_holds_a_batch_is_short_in_the_last_batches_only(seed: int) -> None:
    shapes, repeats, batch_size = ragged(seed)
    batches = run(shapes, repeats, batch_size, 4)
    for shape in set(shapes):
        counts = [count for count, other in zip(repeats, shapes, strict=True) if other == shape]
        sizes = [len(batch.indices) for batch in batches if shapes[batch.indices[0]] == shape]
        if sum(counts) >= batch_size * max(counts):
            rest = 4 * sum(counts) % batch_size
            assert sizes == [batch_size] * (len(sizes) - bool(rest)) + [rest] * bool(rest)
        else:
            assert len(sizes) == 4 * max(counts)
            assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_every_epoch_shows_each_image_once_give_or_take_what_is_carried(seed: int) -> None:
    shapes, repeats, batch_size = ragged(seed)
    batches = Batches(shapes, repeats, batch_size=batch_size, seed=seed)
    seen: Counter[int] = Counter()
    number = 0
    for epoch in range(1, 9):
        while number < sum(b.batches_before(epoch) for b in batches.buckets.values()):
            seen.update(batches.batch(number).indices)
            number += 1
        assert all(0 <= epoch * repeats[n] - seen[n] <= 1 for n in range(len(shapes)))


@pytest.mark.parametrize("seed", range(10))
def test_a_batch_is_a_function_of_seed_and_number(seed: int) -> None:
    shapes, repeats, batch_size = ragged(seed)
    straight = Batches(shapes, repeats, batch_size=batch_size, seed=seed)
    expected = [straight.batch(number) for number in range(150)]
    numbers = list(range(150))
    random.Random(seed).shuffle(numbers)
    jumping = Batches(shapes, repeats, batch_size=batch_size, seed=seed)
    assert {n: jumping.batch(n) for n in numbers} == dict(enumerate(expected))
    assert Batches(shapes, repeats, batch_size=batch_size, seed=seed).batch(149) == expected[149]


@pytest.mark.parametrize("seed", range(10))
def test_a_run_of_epochs_goes_like_an_endless_one_up_to_its_last_batches(seed: int) -> None:
    shapes, repeats, batch_size = ragged(seed)
    endless = Batches(shapes, repeats, batch_size=batch_size, seed=seed)
    last = sum(bucket.batches_before(3) for bucket in endless.buckets.values())
    batches = run(shapes, repeats, batch_size, 3, seed)
    assert batches[:last] == [endless.batch(number) for number in range(last)]


def test_there_is_no_batch_after_the_last() -> None:
    batches = Batches([SQUARE] * 5, batch_size=4, seed=0, epochs=2)
    assert batches.total == 3
    assert len(batches.batch(2).indices) == 2
    with pytest.raises(ValueError, match="of a run of 3"):
        batches.batch(3)


def test_far_epochs_cost_no_more_than_the_first() -> None:
    batches = Batches([SQUARE] * 37, batch_size=8, seed=0)
    far = 37 * 10**9  # batches: eight thousand million epochs of 37 images
    assert len(batches.batch(far).indices) == 8
    assert batches.batch(far).samples.start == 8 * far


def test_seeds_and_epochs_have_their_own_order() -> None:
    orders = {
        Batches([SQUARE] * 40, batch_size=40, seed=seed).batch(number).indices
        for seed in range(3)
        for number in range(3)
    }
    assert len(orders) == 9


def test_shapes_alternate_within_an_epoch() -> None:
    shapes = [SQUARE] * 40 + [WIDE] * 40
    batches = Batches(shapes, batch_size=4, seed=0)
    order = [shapes[batches.batch(number).indices[0]] for number in range(20)]
    assert order != sorted(order)
    assert order != sorted(order, reverse=True)


def test_what_is_carried_changes_from_epoch_to_epoch() -> None:
    bucket = Batches([SQUARE] * 9, batch_size=8, seed=0).buckets[SQUARE]
    left = [bucket.left(epoch) for epoch in range(1, 8)]
    assert [len(images) for images in left] == list(range(1, 8))
    assert len({images[0] for images in left}) > 2


def test_batches_are_counted() -> None:
    batches = Batches([SQUARE] * 5 + [WIDE] * 4 + [TALL], batch_size=4, seed=0)
    assert batches.samples_per_epoch == 10
    assert batches.batches_per_epoch == 5 / 4 + 1 + 1
    with pytest.raises(ValueError, match="0 images"):
        Batches([], batch_size=4, seed=0)

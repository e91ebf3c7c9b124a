from collections import Counter
from fractions import Fraction

import pytest

from eri.config import Train
from eri.data import Batches, Shape
from eri.run.steps import auto_steps, run_samples, run_steps


def batches(count: int, *, size: int = 4, epochs: int | None = None, repeats: int = 1) -> Batches:
    shapes = [Shape(64, 64)] * count
    return Batches(shapes, [repeats] * count, batch_size=size, seed=0, epochs=epochs)


@pytest.mark.parametrize(
    ("images", "batch_size", "accumulate", "steps"),
    [
        (1, 4, 1, 500),  # 25, but at least 500
        (20, 4, 1, 500),
        (21, 4, 1, 525),
        (33, 4, 1, 825),
        (53, 4, 2, 663),  # 662.5
        (33, 8, 2, 500),
        (121, 4, 1, 3000),
        (1000, 4, 1, 3000),
    ],
)
def test_auto_shows_each_image_a_hundred_times_within_limits(
    images: int, batch_size: int, accumulate: int, steps: int
) -> None:
    train = Train(batch_size=batch_size, accumulate=accumulate)
    found = batches(images, size=batch_size)
    assert run_steps(train, found, range(images)) == steps


@pytest.mark.parametrize(
    ("own", "kept", "repeats", "aside", "of_a_step", "wanted"),
    [
        (40, 0, 1, 0, 4, 1000),
        (40, 0, 5, 0, 4, 1000),  # repeats lengthen epochs, not the run
        (40, 40, 1, 0, 2, 2000),  # every other sample is of an image that regularizes
        (40, 10, 4, 0, 2, 2000),
        (20, 0, 1, 1, Fraction(7, 2), 600),  # 5 full batches and one of a single image
    ],
)
def test_auto_counts_what_a_step_really_shows_of_the_images(
    own: int, kept: int, repeats: int, aside: int, of_a_step: Fraction, wanted: int
) -> None:
    shapes = [Shape(64, 64)] * (own + kept) + [Shape(64, 128)] * aside
    times = [repeats if kept == 0 else 1] * own + [repeats] * kept + [1] * aside
    found = Batches(shapes, times, batch_size=4, seed=0)
    learned = [*range(own), *range(own + kept, len(shapes))]
    auto = auto_steps(Train(), found, learned)
    assert (auto.images, auto.of_a_step, auto.wanted) == (own + aside, of_a_step, wanted)
    shown = Counter(index for number in range(wanted) for index in found.batch(number).indices)
    assert sum(shown[index] for index in learned) / len(learned) == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize(
    ("images", "repeats", "epochs", "accumulate", "steps"),
    [(61, 1, 5, 1, 77), (61, 1, 5, 2, 39), (8, 1, 3, 1, 6), (3, 1, 2, 1, 2), (5, 2, 1, 1, 3)],
)
def test_epochs_are_as_many_steps_as_their_batches_make(
    images: int, repeats: int, epochs: int, accumulate: int, steps: int
) -> None:
    train = Train(epochs=epochs, accumulate=accumulate)
    found = batches(images, epochs=epochs, repeats=repeats)
    assert run_steps(train, found, range(images)) == steps
    assert run_samples(train, found, steps) == epochs * images * repeats


def test_a_number_is_taken_as_it_is() -> None:
    train = Train(steps=7, accumulate=3)
    assert run_steps(train, batches(1000), range(1000)) == 7
    assert run_samples(train, batches(1000), 7) == 7 * 3 * 4


def test_samples_count_the_batches_that_are_not_full() -> None:
    # 3 images in batches of up to 4: one batch of 3 an epoch
    assert run_samples(Train(steps=10), batches(3), 10) == 30

"""What a mask over half of every image leaves for the other half, on the demo model."""

import pytest

from scripts.measure_mask import DEMO, encoded, learn, pull


@pytest.fixture(scope="module")
def pictures():
    """Some pictures to train on and some to measure on; their right halves are negatives."""
    return [
        encoded(DEMO / folder, negative=True, count=count)
        for folder, count in (("data", 8), ("validation", 2))
    ]


@pytest.mark.parametrize("unmasked", [0.0, 0.5])
def test_the_half_that_is_left_out_pulls_with_its_weight(pictures, unmasked: float) -> None:
    (sample, *_), _ = pictures
    plain, masked = pull(sample, None), pull(sample, unmasked)
    assert min(plain.left, plain.right) > 0
    assert masked.right / masked.left == pytest.approx(unmasked * plain.right / plain.left)
    assert masked.left == pytest.approx(plain.left * 2 / (1 + unmasked))  # a mean over what counts


def test_what_only_the_half_that_is_left_out_shows_is_not_learned(pictures) -> None:
    samples, held_out = pictures
    (whole,) = learn(samples, held_out, None, [7]).values()
    (masked,) = learn(samples, held_out, 0.0, [7]).values()
    assert whole.right > 0.3
    assert masked.right < whole.right / 3
    assert masked.left > whole.left > 0.1

import pytest
import torch

from eri.rng import generator, normal


def draw(seed: int = 0, purpose: str = "noise", step: int = 0, sample: int = 0) -> torch.Tensor:
    return torch.randn(8, generator=generator(seed, purpose, step=step, sample=sample))  # type: ignore[arg-type]


def test_the_same_key_gives_the_same_numbers_whatever_came_before() -> None:
    first = draw()
    torch.manual_seed(99)
    draw(step=5)
    assert torch.equal(draw(), first)


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"purpose": "latent"}, {"step": 1}, {"sample": 1}, {"seed": -1}]
)
def test_every_part_of_the_key_matters(other: dict) -> None:
    assert not torch.equal(draw(**other), draw())


def test_parts_of_the_key_do_not_run_into_each_other() -> None:
    assert not torch.equal(draw(step=1, sample=11), draw(step=11, sample=1))
    assert not torch.equal(draw(step=12, sample=3), draw(step=1, sample=23))


def test_a_sample_does_not_depend_on_the_batch_it_is_in() -> None:
    whole = normal((4, 2, 2), 7, "noise", step=3, samples=range(10, 16))
    part = normal((4, 2, 2), 7, "noise", step=3, samples=range(12, 14))
    assert whole.shape == (6, 4, 2, 2)
    assert whole.dtype == torch.float32
    assert torch.equal(whole[2:4], part)


def test_the_numbers_are_standard_normal() -> None:
    numbers = normal((64, 64), 0, "noise", step=0, samples=range(16))
    assert abs(numbers.mean().item()) < 0.02
    assert abs(numbers.std().item() - 1.0) < 0.02


def test_a_run_of_today_can_be_repeated_by_a_later_version() -> None:
    assert generator(0, "noise").initial_seed() == 234199501199194742
    assert generator(7, "order", step=3, sample=2).initial_seed() == 6893362974359768835

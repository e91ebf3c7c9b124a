import pytest
import torch

from eri.diffusion import NoiseSchedule

PUBLISHED = {0: 0.99915, 10: 0.9904313091, 100: 0.8942234776, 500: 0.2763326838, 999: 0.0046600985}


@pytest.mark.parametrize(("t", "alpha"), PUBLISHED.items())
def test_stable_diffusions_schedule(t: int, alpha: float) -> None:
    assert NoiseSchedule().alphas_cumprod[t].item() == pytest.approx(alpha, rel=1e-5)


def test_linear_betas_are_even() -> None:
    betas = NoiseSchedule(beta_start=0.1, beta_end=0.3, beta_schedule="linear", timesteps=3).betas
    assert betas.tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_noise_is_added_in_float32_by_the_formula() -> None:
    schedule = NoiseSchedule()
    latents = torch.full((2, 1, 1, 1), 2.0, dtype=torch.bfloat16)
    noise = torch.full((2, 1, 1, 1), -1.0)
    noisy = schedule.add_noise(latents, noise, torch.tensor([0, 999]))
    assert noisy.dtype == torch.float32
    expected = [2 * a**0.5 - (1 - a) ** 0.5 for a in (PUBLISHED[0], PUBLISHED[999])]
    assert noisy.flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_both_targets_give_the_image_back() -> None:
    latents, noise = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    t = torch.tensor([0, 300, 700, 999])
    epsilon = NoiseSchedule(prediction="epsilon")
    velocity = NoiseSchedule(prediction="v_prediction")
    assert torch.equal(epsilon.target(latents, noise, t), noise)
    alpha = velocity.alphas_cumprod[t][:, None, None, None]
    noisy = velocity.add_noise(latents, noise, t)
    back = alpha.sqrt() * noisy - (1 - alpha).sqrt() * velocity.target(latents, noise, t)
    torch.testing.assert_close(back, latents, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrong", [{"beta_schedule": "squared"}, {"prediction": "sample"}])
def test_what_is_not_known_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong.values()))):
        NoiseSchedule(**wrong)  # type: ignore[arg-type]

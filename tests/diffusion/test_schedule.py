import pytest
import torch

from eri.diffusion import NoiseSchedule

PUBLISHED = {0: 0.99915, 10: 0.9904313091, 100: 0.8942234776, 500: 0.2763326838, 999: 0.0046600985}


@pytest.mark.parametrize(("t", "alpha"), PUBLISHED.items())
def test_stable_diffusions_schedule(t: int, alpha: float) -> None:
    assert NoiseSchedule().alphas_cumprod[t].item() == pytest.approx(alpha, rel=1e-5)


RESCALED = {0: 0.99915, 100: 0.8867612845, 500: 0.2410187828, 900: 0.0029603934, 998: 1.9679e-7}


def zero_terminal_snr() -> NoiseSchedule:
    return NoiseSchedule(prediction="v_prediction", zero_terminal_snr=True)


@pytest.mark.parametrize(("t", "alpha"), RESCALED.items())
def test_the_rescaled_schedule(t: int, alpha: float) -> None:
    assert zero_terminal_snr().alphas_cumprod[t].item() == pytest.approx(alpha, rel=1e-5)


def test_the_rescaled_betas_are_those_of_diffusers() -> None:
    from diffusers.schedulers.scheduling_euler_discrete import rescale_zero_terminal_snr

    plain, rescaled = NoiseSchedule().betas, zero_terminal_snr().betas
    torch.testing.assert_close(rescaled, rescale_zero_terminal_snr(plain), atol=1e-12, rtol=0)
    assert rescaled.dtype == torch.float64
    assert (rescaled - plain).abs().max() > 0.5


def test_with_zero_terminal_snr_the_last_step_is_pure_noise_and_its_target_the_image() -> None:
    latents, noise, last = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([999])
    schedule = zero_terminal_snr()
    assert torch.equal(schedule.add_noise(latents, noise, last), noise)
    assert torch.equal(schedule.target(latents, noise, last), -latents)
    leaking = NoiseSchedule().add_noise(latents, noise, last)
    assert (leaking - noise).abs().max() > 0.05


def test_zero_terminal_snr_cannot_be_learned_from_the_noise() -> None:
    with pytest.raises(ValueError, match="zero_terminal_snr: expected v_prediction"):
        NoiseSchedule(zero_terminal_snr=True)


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

import torch
from torch import Tensor

from eri.diffusion import NoiseSchedule, denoising_loss


def test_a_perfect_prediction_costs_nothing_and_any_other_its_mean_square() -> None:
    latents, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 5, 999])
    schedule = NoiseSchedule()
    assert denoising_loss(lambda x, t: noise, latents, noise, t, schedule).tolist() == [0, 0, 0]
    shifts = torch.tensor([0.0, 1.0, 2.0])[:, None, None, None]
    loss = denoising_loss(lambda x, t: noise + shifts, latents, noise, t, schedule)
    torch.testing.assert_close(loss, torch.tensor([0.0, 1.0, 4.0]))


def test_the_net_sees_the_noisy_latent_and_its_timestep() -> None:
    latents, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([7, 900])
    schedule = NoiseSchedule()

    def predict(x: Tensor, timesteps: Tensor) -> Tensor:
        assert torch.equal(x, schedule.add_noise(latents, noise, t))
        assert torch.equal(timesteps, t)
        return noise

    denoising_loss(predict, latents, noise, t, schedule)


def test_the_loss_is_float32_whatever_the_net_answers_in() -> None:
    latents = torch.randn(1, 4, 8, 8, dtype=torch.bfloat16)
    noise = torch.randn(1, 4, 8, 8)
    loss = denoising_loss(
        lambda x, t: noise.bfloat16(), latents, noise, torch.tensor([3]), NoiseSchedule()
    )
    assert loss.dtype == torch.float32
    assert 0 < loss.item() < 1e-4  # the rounding of the answer, and nothing of the target's

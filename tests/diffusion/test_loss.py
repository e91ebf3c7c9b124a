import pytest
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


def constant(error: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss of predictions that are off by `error` `[B, C, H, W]`, and its gradient to them."""
    latents, noise = torch.zeros_like(error), torch.randn_like(error)
    noise = (noise * 8).round()  # so that the sum below is exact
    prediction = (noise + error).requires_grad_()
    timesteps = torch.arange(len(error))
    loss = denoising_loss(
        lambda x, t: prediction, latents, noise, timesteps, NoiseSchedule(), weights=weights
    )
    loss.sum().backward()
    assert prediction.grad is not None
    return loss.detach(), prediction.grad


@pytest.mark.parametrize("unmasked", [0.0, 0.5])
def test_what_a_mask_leaves_out_has_its_share_of_the_gradient(unmasked: float) -> None:
    weights = torch.ones(2, 1, 8, 8)
    weights[..., :4] = unmasked
    error = torch.full((2, 4, 8, 8), 0.25)
    _, gradient = constant(error, weights)
    kept, left_out = gradient[..., 4:], gradient[..., :4]
    assert (kept > 0).all()
    assert torch.equal(left_out, unmasked * kept)


@pytest.mark.parametrize("columns", range(1, 9))
def test_the_size_of_a_mask_does_not_change_the_loss(columns: int) -> None:
    weights = torch.zeros(1, 1, 8, 8)
    weights[..., :columns] = 0.75
    loss, gradient = constant(torch.full((1, 4, 8, 8), 2.0), weights)
    assert loss.item() == pytest.approx(4)
    assert gradient.sum().item() == pytest.approx(4)  # 2 · error, shared by fewer pixels


def test_what_is_left_out_does_not_count_and_what_is_kept_does() -> None:
    error = torch.full((2, 4, 8, 8), 2.0)
    error[..., :4] = 100
    weights = torch.ones(2, 1, 8, 8)
    weights[0, ..., :4] = 0
    loss, _ = constant(error, weights)
    assert loss.tolist() == [4, (4 + 100**2) / 2]


def test_weights_that_are_all_alike_change_nothing() -> None:
    error = torch.randn(3, 4, 8, 8)
    plain, weighted = constant(error, None)[0], constant(error, torch.full((3, 1, 8, 8), 0.5))[0]
    torch.testing.assert_close(weighted, plain)


def test_an_image_that_is_masked_altogether_teaches_nothing() -> None:
    weights = torch.ones(2, 1, 8, 8)
    weights[0] = 0
    loss, gradient = constant(torch.full((2, 4, 8, 8), 2.0), weights)
    assert loss.tolist() == [0, 4]
    assert torch.equal(gradient[0], torch.zeros(4, 8, 8))

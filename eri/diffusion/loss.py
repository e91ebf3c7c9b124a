"""The denoising loss: noise, target and difference in float32, whatever the net computes in."""

from collections.abc import Callable

import torch
from torch import Tensor

from eri.diffusion.schedule import NoiseSchedule

__all__ = ["Predict", "denoising_loss"]

Predict = Callable[[Tensor, Tensor], Tensor]
"""The net with its conditions bound: x_t `[B, C, H, W]` and t `[B]` to the prediction."""


def denoising_loss(
    predict: Predict, latents: Tensor, noise: Tensor, timesteps: Tensor, schedule: NoiseSchedule
) -> Tensor:
    """Mean squared error between prediction and target, one number for each sample.

    Source: Ho et al., arXiv 2006.11239, equation 14.

    Args:
        predict: the net; it is given float32 and may answer in any dtype.
        latents: x_0, `[B, C, H, W]`.
        noise: ε, of the same shape.
        timesteps: t, int64 `[B]`.
        schedule: the noise schedule and the kind of target.

    Returns:
        float32 `[B]`.
    """
    prediction = predict(schedule.add_noise(latents, noise, timesteps), timesteps)
    error = prediction.float() - schedule.target(latents, noise, timesteps)
    return torch.mean(error.square(), dim=(1, 2, 3))

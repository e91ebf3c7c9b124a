"""The denoising loss: noise, target and difference in float32, whatever the net computes in."""

from collections.abc import Callable

import torch
from torch import Tensor

from eri.diffusion.schedule import NoiseSchedule

__all__ = ["Predict", "denoising_loss"]

Predict = Callable[[Tensor, Tensor], Tensor]
"""The net with its conditions bound: x_t `[B, C, H, W]` and t `[B]` to the prediction."""


def denoising_loss(
    predict: Predict,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    schedule: NoiseSchedule,
    *,
    weights: Tensor | None = None,
) -> Tensor:
    r"""Mean squared error between prediction and target, one number for each sample.

    $$\frac{\sum_{c,h,w} w_{hw}\,d_{chw}^2}{C \sum_{h,w} w_{hw}}$$

    for a difference d: a mean over what has weight, so that how much of an image a mask leaves out
    changes neither the loss of the rest nor the image's share of a batch.

    Source: Ho et al., arXiv 2006.11239, equation 14.

    Args:
        predict: the net; it is given float32 and may answer in any dtype.
        latents: x_0, `[B, C, H, W]`.
        noise: ε, of the same shape.
        timesteps: t, int64 `[B]`.
        schedule: the noise schedule and the kind of target.
        weights: w of each pixel, 0 or more, `[B, 1, H, W]`; None: all alike.

    Returns:
        float32 `[B]`; 0 for a sample without any weight.
    """
    prediction = predict(schedule.add_noise(latents, noise, timesteps), timesteps)
    error = prediction.float() - schedule.target(latents, noise, timesteps)
    if weights is None:
        return torch.mean(error.square(), dim=(1, 2, 3))
    weights = weights.float()
    area = error.shape[1] * weights.sum(dim=(1, 2, 3))
    total = torch.sum(weights * error.square(), dim=(1, 2, 3))
    return total / area.clamp(min=torch.finfo(torch.float32).tiny)  # without weight: 0 / tiny

"""Preview samplers: a thin adapter to diffusers' schedulers, with the settings that UIs use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from eri.diffusion.loss import Predict
from eri.diffusion.schedule import NoiseSchedule

if TYPE_CHECKING:
    from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

__all__ = ["Sampler", "sample"]

Sampler = Literal["euler", "dpmpp_2m_karras"]


@torch.no_grad()
def sample(
    predict: Predict, noise: Tensor, schedule: NoiseSchedule, *, sampler: Sampler, steps: int
) -> Tensor:
    """Denoise from pure noise.

    Args:
        predict: the net with its conditions and guidance bound.
        noise: standard normal `[B, C, H, W]`.
        schedule: the schedule that the net was trained with.
        sampler: Euler over evenly spaced timesteps, or DPM++ 2M over Karras' noise levels.
        steps: evaluations of `predict`.

    Returns:
        float32 latents `[B, C, H, W]`.
    """
    solver = _solver(sampler, schedule)
    solver.set_timesteps(steps, device=noise.device)
    solver.set_begin_index(0)  # else sought by timestep, which two noise levels may share
    x = noise.float() * solver.init_noise_sigma
    for t in solver.timesteps:
        timesteps = t.expand(x.shape[0]).to(x.device)
        prediction = predict(solver.scale_model_input(x, t), timesteps)
        x = solver.step(prediction.float(), t, x, return_dict=False)[0]
    return x


def _solver(
    sampler: Sampler, schedule: NoiseSchedule
) -> EulerDiscreteScheduler | DPMSolverMultistepScheduler:
    from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

    betas = schedule.betas.tolist()
    if schedule.zero_terminal_snr:
        # a noise level that is finite: half the signal of the step before, so that the last ᾱ is
        # 4.9e-8, within 1 % of what ComfyUI and A1111 put there
        betas[-1] = 0.75
    shared = {
        "num_train_timesteps": schedule.timesteps,
        "trained_betas": betas,
        "prediction_type": schedule.prediction,
        "timestep_spacing": "linspace",  # from the last one on, as ComfyUI and A1111 do
    }
    if sampler == "euler":
        return EulerDiscreteScheduler(**shared)
    return DPMSolverMultistepScheduler(
        **shared, algorithm_type="dpmsolver++", solver_order=2, use_karras_sigmas=True
    )

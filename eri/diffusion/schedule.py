r"""The noise schedule: how much of an image is left at each timestep, and what the net predicts.

$$x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1 - \bar\alpha_t}\,\epsilon$$

Source: Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239, equation 4. With
zero terminal SNR nothing of the image is left at the last timestep: Lin et al., arXiv 2305.08891.
"""

from typing import Literal

import torch
from torch import Tensor

__all__ = ["NoiseSchedule", "Prediction"]

Prediction = Literal["epsilon", "v_prediction"]


class NoiseSchedule:
    r"""Cumulative products $\bar\alpha_t$ of 1 - β, in float32.

    Args:
        beta_start: β at timestep 0.
        beta_end: β at the last timestep.
        beta_schedule: `scaled_linear` interpolates √β linearly (Stable Diffusion), `linear` β.
        timesteps: T.
        prediction: what the net predicts.
        zero_terminal_snr: √ᾱ is shifted and scaled so that the last one is 0 and the first stays.

    Raises:
        ValueError: an unknown `beta_schedule` or `prediction`, or zero terminal SNR with `epsilon`:
            the last x_t would be ε itself, and predicting it tells nothing of the image.
    """

    def __init__(
        self,
        *,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        timesteps: int = 1000,
        prediction: str = "epsilon",
        zero_terminal_snr: bool = False,
    ) -> None:
        powers = {"scaled_linear": 0.5, "linear": 1.0}
        if beta_schedule not in powers:
            raise ValueError(f"beta_schedule {beta_schedule!r}: expected one of {list(powers)}")
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction {prediction!r}: expected epsilon or v_prediction")
        if zero_terminal_snr and prediction == "epsilon":
            raise ValueError("zero_terminal_snr: expected v_prediction, not epsilon")
        power = powers[beta_schedule]
        ends = beta_start**power, beta_end**power
        roots = torch.linspace(*ends, timesteps, dtype=torch.float64)
        self.betas = roots ** (1 / power)
        alphas_cumprod = torch.cumprod(1 - self.betas, 0)
        if zero_terminal_snr:
            alphas_cumprod = _without_last_signal(alphas_cumprod)
            self.betas = 1 - alphas_cumprod / torch.cat([torch.ones(1), alphas_cumprod[:-1]])
        self.alphas_cumprod = alphas_cumprod.float()
        self._on_device: dict[torch.device, Tensor] = {}
        self.timesteps = timesteps
        self.prediction: Prediction = prediction
        self.zero_terminal_snr = zero_terminal_snr

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t from x_0 `[B, C, H, W]`, ε of the same shape and t `[B]`; in float32."""
        signal, spread = self._coefficients(timesteps, latents.device)
        return signal * latents.float() + spread * noise.float()

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the net should have predicted, in float32.

        ε, or v = √ᾱ·ε - √(1-ᾱ)·x_0 (Salimans and Ho, arXiv 2202.00512, appendix D).
        """
        if self.prediction == "epsilon":
            return noise.float()
        signal, spread = self._coefficients(timesteps, latents.device)
        return signal * noise.float() - spread * latents.float()

    def _coefficients(self, timesteps: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._on_device:  # once: a copy from the host waits for a GPU
            self._on_device[device] = self.alphas_cumprod.to(device)
        alpha = self._on_device[device][timesteps.to(device)][:, None, None, None]
        return alpha.sqrt(), (1 - alpha).sqrt()


def _without_last_signal(alphas_cumprod: Tensor) -> Tensor:
    """ᾱ `[T]` with its last one 0 and its first one as it was.

    Source: Lin et al., arXiv 2305.08891, algorithm 1.
    """
    signal = alphas_cumprod.sqrt()
    first, last = signal[0], signal[-1]
    return ((signal - last) * first / (first - last)).square()

"""Images to latents and back: a thin adapter to diffusers' AutoencoderKL."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eri.formats import diffusers_folder, vae_names
from eri.models.load import fill, read_weights

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

__all__ = ["VAE", "load_vae"]


class VAE:
    """A latent autoencoder whose latents are scaled as the U-Net expects them."""

    def __init__(self, model: AutoencoderKL) -> None:
        self.model: Any = model  # its methods are typed for other kinds of tensors
        self.scale = float(model.config["scaling_factor"])
        self.factor = 2 ** (len(model.config["block_out_channels"]) - 1)
        """Pixels a latent pixel stands for, along each side."""

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images to the latent's distribution.

        Args:
            images: `[B, 3, H, W]` in [-1, 1]; H and W multiples of `factor`.

        Returns:
            Mean and standard deviation, each `[B, 4, H/factor, W/factor]`, scaled.
        """
        latent = self.model.encode(images.to(self.model.device, self.model.dtype)).latent_dist
        return latent.mean * self.scale, latent.std * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents `[B, 4, H, W]` to images `[B, 3, H·factor, W·factor]`."""
        unscaled = latents.to(self.model.device, self.model.dtype) / self.scale
        return self.model.decode(unscaled).sample.clamp(-1, 1)


def load_vae(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> VAE:
    """Build the autoencoder of a diffusers folder and load its weights.

    Raises:
        ModelError: it is missing, its config is not supported, or the weights do not fit.
    """
    from diffusers import AutoencoderKL

    folder = diffusers_folder.component(Path(path), "vae")
    with torch.device("meta"):
        model = AutoencoderKL(**diffusers_folder.vae_config(folder))
    weights = {
        vae_names.current(name): tensor
        for name, tensor in read_weights(diffusers_folder.weights(folder), device, dtype)
    }
    fill(model, weights, where=folder)
    return VAE(model.requires_grad_(False).eval())

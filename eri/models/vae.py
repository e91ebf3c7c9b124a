"""Images to latents and back: a thin adapter to diffusers' AutoencoderKL."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eri.errors import ModelError
from eri.formats.checkpoint import VAE_SCALES, vae_part
from eri.formats.parts import Family
from eri.models.load import fill
from eri.printable import printable

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
    family: Family | None = None,
) -> VAE:
    """Build the autoencoder of a model and load its weights.

    Args:
        path: a diffusers folder, its `vae` folder, or a safetensors file of a model or a VAE.
        dtype: of the weights.
        device: of the weights.
        family: of the U-Net that it goes with; needed for a file with a VAE alone, which does not
            tell by what its latents are multiplied.

    Raises:
        ModelError: it is missing, is not supported, or the weights do not fit.
        ValueError: nothing tells the scale of the latents.
    """
    from diffusers import AutoencoderKL

    part = vae_part(Path(path), family)
    if part is None:
        raise ModelError(
            "the model has no VAE",
            where=printable(path),
            hint="name one in model.vae: the folder or file of a model of the same family",
        )
    if "scaling_factor" not in part.config:
        known = ", ".join(f"{name} {scale}" for name, scale in VAE_SCALES.items())
        raise ValueError(f"load_vae: pass family= to say the scale of the latents ({known})")
    with torch.device("meta"):
        model = AutoencoderKL(**part.config)
    fill(model, part.pieces, dtype=dtype, device=device, where=Path(path))
    return VAE(model.requires_grad_(False).eval())

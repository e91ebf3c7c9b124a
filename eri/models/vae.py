"""Images to latents and back: a thin adapter to diffusers' AutoencoderKL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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

__all__ = ["TILE", "VAE", "load_vae"]

TILE = 512
"""Side in pixels of the tiles in which large images are taken when the memory is short."""


class VAE:
    """A latent autoencoder whose latents are scaled as the U-Net expects them."""

    def __init__(self, model: AutoencoderKL) -> None:
        self.model: Any = model  # its methods are typed for other kinds of tensors
        self.scale = float(model.config["scaling_factor"])
        self.factor = 2 ** (len(model.config["block_out_channels"]) - 1)
        """Pixels a latent pixel stands for, along each side."""

    def to(self, device: torch.device | str) -> VAE:
        """Move the weights, in place; returns itself."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor, tiled: bool = False) -> tuple[Tensor, Tensor]:
        """Encode images to the latent's distribution.

        Args:
            images: `[B, 3, H, W]` in [-1, 1]; H and W multiples of `factor`.
            tiled: see `_tiling`.

        Returns:
            Mean and standard deviation, each `[B, 4, H/factor, W/factor]`, scaled.
        """
        with self._tiling(tiled):
            latent = self.model.encode(images.to(self.model.device, self.model.dtype)).latent_dist
        return latent.mean * self.scale, latent.std * self.scale

    def encode_within_memory(self, images: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Encode images whole or, if that runs out of memory, in tiles.

        Returns:
            As `encode`, and whether it was done in tiles.

        Raises:
            torch.OutOfMemoryError: the memory does not suffice for a tile either.
        """
        try:
            return *self.encode(images), False
        except torch.OutOfMemoryError:
            if max(images.shape[-2:]) <= TILE:  # it is one tile
                raise
        torch.cuda.empty_cache()  # outside of `except`, which keeps what the attempt allocated
        return *self.encode(images, tiled=True), True

    @torch.no_grad()
    def decode(self, latents: Tensor, tiled: bool = False) -> Tensor:
        """Decode scaled latents `[B, 4, H, W]` to images `[B, 3, H·factor, W·factor]`.

        Args:
            latents: as `encode` gives them.
            tiled: see `_tiling`.
        """
        unscaled = latents.to(self.model.device, self.model.dtype) / self.scale
        with self._tiling(tiled):
            return self.model.decode(unscaled).sample.clamp(-1, 1)

    @contextmanager
    def _tiling(self, tiled: bool) -> Iterator[None]:
        """While it lasts, images larger than `TILE` are taken in overlapping tiles, blended where
        they meet: the memory of one tile, and slightly other numbers, as a tile's norms and
        attention see that tile alone.
        """
        if not tiled:
            yield
            return
        self.model.tile_sample_min_size = TILE  # its own is a whole image, 1024 for SDXL
        self.model.tile_latent_min_size = TILE // self.factor
        self.model.enable_tiling()
        try:
            yield
        finally:
            self.model.disable_tiling()


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

"""The denoising U-Net, assembled from `LoRAUNetBlock` stages by a spec.

Shapes: B batch, C channels, H W height and width of the latent, E time embedding, S context tokens
of width K, P width of the pooled text embedding.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eri.formats.parts import Family
from eri.layers import Conv2d, GroupNorm, Linear
from eri.layers.frozen_conv import frozen_conv
from eri.layers.group_norm_silu import group_norm_silu
from eri.layers.lora import base_of
from eri.models.stage import LoRAUNetBlock, UNetConfig

__all__ = ["UNet", "UNetSpec", "sinusoid"]


@dataclass(frozen=True, kw_only=True)
class UNetSpec:
    """A U-Net as data: its stages and the widths around them."""

    family: Family
    in_channels: int  # C of the latent that goes in
    out_channels: int  # C of the prediction
    sample_size: int  # side in latent pixels of what it was trained on
    context_dim: int  # K
    down: tuple[UNetConfig, ...]
    mid: UNetConfig
    up: tuple[UNetConfig, ...]
    pooled_dim: int | None = None  # P (SDXL); None: no pooled text and no size ids
    time_id_dim: int | None = None  # width of each size id's sinusoid (SDXL: 256)

    @property
    def model_channels(self) -> int:
        """C after `conv_in`."""
        return self.down[0].in_channels

    @property
    def temb_channels(self) -> int:
        """E."""
        return 4 * self.model_channels

    @property
    def divisor(self) -> int:
        """What H and W must be multiples of: 2 for each stage that halves them."""
        return 2 ** sum(config.downsample for config in self.down)


def sinusoid(values: Tensor, width: int) -> Tensor:
    """Embed numbers as cosines and sines of geometric frequencies, cosines first.

    Source: Vaswani et al., arXiv 1706.03762, section 3.5; the order is that of Stable Diffusion.

    Args:
        values: `[N]`, any real numbers.
        width: of the result; even.

    Returns:
        float32 `[N, width]`.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class _Embedding(nn.Module):
    """Two linear layers with SiLU between them."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.linear_1 = Linear(in_features, width)
        self.linear_2 = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class UNet(nn.Module):
    """Predicts noise (or v) from a noisy latent, a timestep and text states.

    Source: Rombach et al., arXiv 2112.10752; SDXL's added conditions: Podell et al.,
    arXiv 2307.01952, section 2.2.

    Args:
        spec: what to build.
    """

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.lean = False  # see `eri.models.arrange`
        self.spec = spec
        channels, temb = spec.model_channels, spec.temb_channels
        self.conv_in = Conv2d(spec.in_channels, channels, 3, 1, 1)
        self.time_embedding = _Embedding(channels, temb)
        self.add_embedding = (
            None
            if spec.pooled_dim is None or spec.time_id_dim is None
            else _Embedding(spec.pooled_dim + 6 * spec.time_id_dim, temb)
        )
        self.down = nn.ModuleList(LoRAUNetBlock(config) for config in spec.down)
        self.mid = LoRAUNetBlock(spec.mid)
        self.up = nn.ModuleList(LoRAUNetBlock(config) for config in spec.up)
        self.norm_out = GroupNorm(spec.mid.groups, channels, spec.mid.eps)
        self.conv_out = Conv2d(channels, spec.out_channels, 3, 1, 1)

    @property
    def dtype(self) -> torch.dtype:
        """What the net computes in; adapters may keep their matrices in another type."""
        return base_of(self.conv_in).weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the net is."""
        return base_of(self.conv_in).weight.device

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """Predict.

        Args:
            x: `[B, C, H, W]`; H and W multiples of `spec.divisor`.
            timesteps: `[B]`.
            context: `[B, S, K]`.
            pooled: `[B, P]`, where the spec has a `pooled_dim`.
            time_ids: `[B, 6]` in pixels: original height and width, crop top and left, target
                height and width; with `pooled`.

        Returns:
            `[B, C', H, W]`.

        Raises:
            ValueError: a shape that does not fit the spec.
        """
        self._check(x, context)
        temb = self._embed(x, timesteps, pooled, time_ids)
        x = self.conv_in(x)
        skips = [x]
        for stage in self.down:
            x = stage(x, temb, context, skips)
        x = self.mid(x, temb, context)
        for stage in self.up:
            x = stage(x, temb, context, skips)
        if self.lean:
            return frozen_conv(group_norm_silu(x, self.norm_out), self.conv_out)
        return self.conv_out(F.silu(self.norm_out(x)))

    def _embed(
        self, x: Tensor, timesteps: Tensor, pooled: Tensor | None, time_ids: Tensor | None
    ) -> Tensor:
        temb = self.time_embedding(sinusoid(timesteps, self.spec.model_channels).to(x.dtype))
        if self.add_embedding is None or self.spec.time_id_dim is None:
            return temb
        if pooled is None or time_ids is None:
            raise ValueError(f"UNet ({self.spec.family}) needs pooled [B, P] and time_ids [B, 6]")
        sizes = sinusoid(time_ids.flatten(), self.spec.time_id_dim).reshape(x.shape[0], -1)
        return temb + self.add_embedding(torch.cat([pooled, sizes.to(pooled.dtype)], dim=-1))

    def _check(self, x: Tensor, context: Tensor) -> None:
        spec = self.spec
        if x.ndim != 4 or x.shape[1] != spec.in_channels:
            raise ValueError(
                f"UNet: x has shape {list(x.shape)}, expected [B, {spec.in_channels}, H, W]"
            )
        if x.shape[2] % spec.divisor or x.shape[3] % spec.divisor:
            raise ValueError(
                f"UNet: a latent of {x.shape[2]}x{x.shape[3]} cannot be halved evenly; "
                f"both sides must be multiples of {spec.divisor}"
            )
        if context.ndim != 3 or context.shape[2] != spec.context_dim:
            raise ValueError(
                f"UNet: context has shape {list(context.shape)}, "
                f"expected [B, S, {spec.context_dim}]"
            )

"""Attention of a UNet, on tokens or on maps, with or without low-rank updates."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from eri.layers.backend import is_transformed
from eri.layers.checks import check_divides, shape_error
from eri.layers.cross_attention import attend, is_fastest
from eri.layers.heads import merge_heads, split_heads
from eri.layers.linear import Linear
from eri.layers.lora_linear import LoRALinear
from eri.layers.norm import GroupNorm

__all__ = ["LoRAAttention"]


class LoRAAttention(nn.Module):
    """softmax(Q Kᵀ / √D) V over `heads` heads, then an output projection.

    Tokens `[B, T, C]` give the attention's output alone, for blocks that have their own norm and
    residual. A map `[B, C, H, W]` is normalised by groups, attended over its H·W positions and
    added to: y = x + attention(norm(x)). Keys and values come from `context` when it is given; a
    short one is attended to by a kernel where there is one, see `eri.layers.cross_attention`.

    `to_q`, `to_k`, `to_v` and `to_out` are `LoRALinear`, or plain `Linear` when rank is None.
    With a rank only the updates train: the norm is frozen like the bases.

    Source: Vaswani et al., arXiv 1706.03762; Rombach et al., arXiv 2112.10752.
    Seed rows: A144, A145.

    Args:
        channels: C, the width of the queries and of the output.
        heads: number of heads.
        rank: rank of the four updates, or None for none.
        alpha: numerator of the updates' scale; None is a scale of 1.0.
        dropout: probability that an element of an adapter's input is dropped in training.
        context_dim: width of `context`; None is `channels`.
        head_dim: D; None is `channels / heads`.
        qkv_bias: whether the three input projections have a bias.
        out_bias: whether the output projection has a bias.
        norm_groups: groups of the map's norm; None builds no norm and accepts tokens only.

    Raises:
        ValueError: `channels` is not divisible by `heads` or by `norm_groups`, or the rank is not
            a positive integer.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        rank: int | None = None,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        context_dim: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = True,
        norm_groups: int | None = 32,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if head_dim is None:
            check_divides(self, "heads", heads, "channels", channels)
            head_dim = channels // heads
        self.channels = channels
        self.heads = heads
        self.context_dim = channels if context_dim is None else context_dim

        def projection(in_features: int, out_features: int, bias: bool) -> Linear | LoRALinear:
            if rank is None:
                return Linear(in_features, out_features, bias, device=device, dtype=dtype)
            return LoRALinear(
                in_features,
                out_features,
                rank,
                alpha=alpha,
                dropout=dropout,
                bias=bias,
                device=device,
                dtype=dtype,
            )

        self.norm: GroupNorm | None = None
        if norm_groups is not None:
            self.norm = GroupNorm(norm_groups, channels, device=device, dtype=dtype)
            self.norm.requires_grad_(rank is None)
        self.to_q = projection(channels, heads * head_dim, qkv_bias)
        self.to_k = projection(self.context_dim, heads * head_dim, qkv_bias)
        self.to_v = projection(self.context_dim, heads * head_dim, qkv_bias)
        self.to_out = projection(heads * head_dim, channels, out_bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Attend from `x` to `context`, or to itself.

        Args:
            x: tokens `[B, T, C]`, or a map `[B, C, H, W]`.
            context: `[B, S, context_dim]`.

        Returns:
            The shape of `x`.

        Raises:
            ValueError: `x` or `context` has another shape, or a map comes without `norm_groups`.
        """
        if x.dim() != 4:
            return self._attend(x, context)
        if self.norm is None:
            raise ValueError(
                f"LoRAAttention: maps need norm_groups, which is None; "
                f"expected tokens [B, T, {self.channels}], found {list(x.shape)}"
            )
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, H·W, C]
        y = self._attend(tokens, context).transpose(1, 2)
        return x + y.unflatten(2, x.shape[2:])

    def _attend(self, x: Tensor, context: Tensor | None) -> Tensor:
        if x.dim() != 3 or x.shape[2] != self.channels:
            expected = f"[B, T, {self.channels}] or [B, {self.channels}, H, W]"
            raise shape_error(self, x, expected)
        source = x if context is None else context
        if source.shape[:1] != x.shape[:1] or source.shape[2:] != (self.context_dim,):
            kind = "tokens of its own" if context is None else "context"
            raise shape_error(self, source, f"[{x.shape[0]}, S, {self.context_dim}] for {kind}")
        q, k, v = self.to_q(x), self.to_k(source), self.to_v(source)
        if context is not None and not is_transformed() and is_fastest(q, k, self.heads):
            return self.to_out(attend(q, torch.cat((k, v), dim=-1), self.heads))
        q, k, v = (split_heads(rows, self.heads) for rows in (q, k, v))
        return self.to_out(merge_heads(F.scaled_dot_product_attention(q, k, v)))

    def extra_repr(self) -> str:
        """Widths and heads; the projections print themselves."""
        return f"channels={self.channels}, heads={self.heads}, context_dim={self.context_dim}"

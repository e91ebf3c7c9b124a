"""The parts that a U-Net stage is made of, and two documented blocks for other nets.

Shapes: B batch, C channels, H W height and width of a map, T tokens (H·W for a map), D width of a
token, E width of the time embedding, S tokens of the context, K their width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eri.layers import (
    GELU,
    Conv2d,
    Dropout,
    GroupNorm,
    LayerNorm,
    Linear,
    LoRAAttention,
    MultiHeadAttention,
)
from eri.layers.group_norm_silu import group_norm_beside
from eri.layers.projection import Projection, project
from eri.models.lean import BlockParts, Recompute, StackParts, transformer_blocks
from eri.models.lean_resnet import ResNetParts, resnet_block

__all__ = [
    "MLP",
    "BasicTransformerBlock",
    "GEGLUFeedForward",
    "ResNetBlock",
    "SpatialTransformer",
    "TransformerBlock",
]


class ResNetBlock(nn.Module):
    r"""Pre-activation residual block of two 3x3 convolutions, with an optional time embedding.

    $$h = \mathrm{conv_1}(\mathrm{silu}(\mathrm{norm_1}\,x)) + W\,\mathrm{silu}(t),\quad
    y = \mathrm{shortcut}(x) + \mathrm{conv_2}(\mathrm{silu}(\mathrm{norm_2}\,h))$$

    The 1x1 `shortcut` exists where the width changes, else it is None.

    Seed rows: A110–A115.

    Args:
        in_channels: C of the input; a multiple of `groups`.
        out_channels: C of the output; a multiple of `groups`.
        temb_channels: E of the time embedding; None for a block without one.
        groups: groups of both GroupNorms.
        eps: added to the variance inside both GroupNorms.

    Raises:
        ValueError: a channel count is not a multiple of `groups`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        temb_channels: int | None = None,
        groups: int = 32,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.lean = False  # see `eri.models.arrange`
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, 1, 1)
        self.time_proj = None if temb_channels is None else Linear(temb_channels, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, 1, 1)
        self.shortcut = (
            None if in_channels == out_channels else Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """Map `x` `[B, C, H, W]` and `temb` `[B, E]` to `[B, C', H, W]`."""
        if self.time_proj is not None and temb is None:
            raise ValueError("ResNetBlock was built with a time embedding: pass temb [B, E]")
        if self.lean:
            return resnet_block(x, temb, self._parts())
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_proj is not None and temb is not None:
            h = h + self.time_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))

    def _parts(self) -> ResNetParts:
        return ResNetParts(
            self.norm1, self.conv1, self.time_proj, self.norm2, self.conv2, self.shortcut
        )


class GEGLUFeedForward(nn.Module):
    r"""Gated feed-forward: $W_o\,(v \odot \mathrm{gelu}(g))$ with $[v, g] = W_i\,x$, exact erf.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202, section 2.

    Args:
        dim: D of the tokens.
        multiplier: hidden width over D.
    """

    def __init__(self, dim: int, *, multiplier: int = 4) -> None:
        super().__init__()
        self.proj_in = Linear(dim, 2 * multiplier * dim)
        self.proj_out = Linear(multiplier * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens `[B, T, D]` to `[B, T, D]`."""
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each pre-norm with a residual.

    Args:
        dim: D of the tokens.
        heads: attention heads; a divisor of D.
        context_dim: K of the context tokens.
        lora_rank: rank of the adapters on both attentions; None for none.
        lora_alpha: their alpha; None scales by 1.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        context_dim: int,
        *,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
    ) -> None:
        super().__init__()

        def attention(key_dim: int | None) -> LoRAAttention:
            return LoRAAttention(
                dim, heads, lora_rank, alpha=lora_alpha, context_dim=key_dim, norm_groups=None
            )

        self.recompute: Recompute = "nothing"  # see `eri.models.arrange`
        self.norm1 = LayerNorm(dim)
        self.attn1 = attention(None)
        self.norm2 = LayerNorm(dim)
        self.attn2 = attention(context_dim)
        self.norm3 = LayerNorm(dim)
        self.ff = GEGLUFeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Map tokens `[B, T, D]` and context `[B, S, K]` to `[B, T, D]`."""
        if self.recompute == "blocks":
            return self._recomputed(self._run, x, context)
        return self._run(x, context)

    def parts(self) -> BlockParts:
        """The layers as `eri.models.lean` runs them; their weights move."""
        attention, cross = self.attn1, self.attn2
        return BlockParts(
            norms=(self.norm1, self.norm2, self.norm3),
            heads=attention.heads,
            self_in=Projection([attention.to_q, attention.to_k, attention.to_v]),
            self_out=Projection([attention.to_out]),
            cross_q=Projection([cross.to_q]),
            cross_out=Projection([cross.to_out]),
            ff_in=Projection([self.ff.proj_in]),
            ff_out=Projection([self.ff.proj_out]),
        )

    def _run(self, x: Tensor, context: Tensor) -> Tensor:
        x = self._attend(x, self.norm1, self.attn1, None)
        x = self._attend(x, self.norm2, self.attn2, context)
        return self._feed(x)

    def _attend(
        self, x: Tensor, norm: LayerNorm, attention: LoRAAttention, context: Tensor | None
    ) -> Tensor:
        if self.recompute == "projections":
            return x + self._recomputed(lambda x: attention(norm(x), context), x)
        return x + attention(norm(x), context)

    def _feed(self, x: Tensor) -> Tensor:
        if self.recompute in {"feed-forward", "projections"}:
            return x + self._recomputed(lambda x: self.ff(self.norm3(x)), x)
        return x + self.ff(self.norm3(x))

    def _recomputed(self, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`run(*inputs)`, of which only the inputs are kept."""
        return checkpoint(run, *inputs, use_reentrant=False)


class _LeanParts(NamedTuple):
    """A spatial transformer as `eri.models.lean` runs it."""

    proj_in: Projection
    proj_out: Projection
    blocks: StackParts | None

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All of them."""
        return self.proj_in, self.proj_out, *(self.blocks.projections if self.blocks else ())


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a map, with a residual around all of them.

    Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models",
    arXiv 2112.10752, section 3.3 and appendix E.2.1.

    Args:
        channels: C of the map and D of its tokens; a multiple of `groups`.
        heads: attention heads.
        depth: number of transformer blocks.
        context_dim: K of the context tokens.
        linear_projection: whether `proj_in` and `proj_out` are linear (SD2.x, SDXL) or 1x1
            convolutions (SD1.x).
        groups: groups of the GroupNorm before the projection.
        lora_rank: rank of the adapters on the attentions; None for none.
        lora_alpha: their alpha; None scales by 1.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        depth: int,
        *,
        context_dim: int,
        linear_projection: bool = False,
        groups: int = 32,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
    ) -> None:
        super().__init__()

        def projection() -> Linear | Conv2d:
            return (
                Linear(channels, channels) if linear_projection else Conv2d(channels, channels, 1)
            )

        self.lean: _LeanParts | None = None  # see `eri.models.arrange`
        self.recompute: Recompute = "nothing"
        self.linear_projection = linear_projection
        self.norm = GroupNorm(groups, channels, 1e-6)
        self.proj_in = projection()
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(
                channels, heads, context_dim, lora_rank=lora_rank, lora_alpha=lora_alpha
            )
            for _ in range(depth)
        )
        self.proj_out = projection()

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Map `x` `[B, C, H, W]` and context `[B, S, K]` to `[B, C, H, W]`."""
        height, width = x.shape[-2:]
        if self.lean is not None:
            return _map(self._lean_run(x, context, self.lean), height, width)
        h = self.norm(x)
        if self.linear_projection:
            h = self.proj_in(_tokens(h))
        else:
            h = _tokens(self.proj_in(h))
        for block in self.blocks:
            h = block(h, context)
        if self.linear_projection:
            h = _map(self.proj_out(h), height, width)
        else:
            h = self.proj_out(_map(h, height, width))
        return x + h

    def make_lean(self, lean: bool) -> None:
        """Run as few functions, whose weights lie where products read them, or as modules."""
        if lean and self.lean is None:
            self.lean = self._lean_parts()
        elif not lean and self.lean is not None:
            for projection in self.lean.projections:
                projection.release()
            self.lean = None

    def _lean_parts(self) -> _LeanParts:
        blocks = [block for block in self.blocks if isinstance(block, BasicTransformerBlock)]
        ends = Projection([self.proj_in]), Projection([self.proj_out])
        if not blocks:
            return _LeanParts(*ends, None)
        words = [layer for block in blocks for layer in (block.attn2.to_k, block.attn2.to_v)]
        parts = [block.parts() for block in blocks]
        return _LeanParts(*ends, StackParts(parts, Projection(words, tails=False)))

    def _lean_run(self, x: Tensor, context: Tensor | None, parts: _LeanParts) -> Tensor:
        """The result as tokens `[B, H·W, C]`; a 1×1 convolution is a linear layer on pixels."""
        n, x = group_norm_beside(x, self.norm)
        h = project(_tokens(n), parts.proj_in)
        if parts.blocks is not None:
            if context is None:
                raise ValueError("SpatialTransformer has blocks: pass their context [B, S, K]")
            h = transformer_blocks(h, context, parts.blocks, self.recompute)
        return project(h, parts.proj_out, residual=_tokens(x))


def _tokens(x: Tensor) -> Tensor:
    """`[B, C, H, W]` to `[B, H·W, C]`."""
    return x.flatten(2).transpose(1, 2)


def _map(x: Tensor, height: int, width: int) -> Tensor:
    """`[B, H·W, C]` to `[B, C, H, W]`."""
    # not by reshape, which gives a batch of one strides that say nothing of how its pixels lie
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)


class MLP(nn.Module):
    """`fc2(gelu(fc1(x)))`, with the tanh form of GELU.

    Seed rows: A117.

    Args:
        dim: D of input and output.
        hidden_dim: width between them; None for four times D.
        dropout: probability after the activation.
    """

    def __init__(self, dim: int, hidden_dim: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        self.fc1 = Linear(dim, hidden_dim)
        self.act = GELU()
        self.dropout = Dropout(dropout)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., D]` to `[..., D]`."""
        return self.fc2(self.dropout(self.act(self.fc1(x))))


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP, each with a residual.

    Seed rows: A116, A118, A133.

    Args:
        dim: D of the tokens.
        num_heads: attention heads; a divisor of D.
        mlp_ratio: hidden width of the MLP over D.
        dropout: probability in the attention weights and after the MLP's activation.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = MultiHeadAttention(dim, num_heads, dropout)
        self.norm2 = LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio), dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens `[B, T, D]` to `[B, T, D]`."""
        h = self.norm1(x)
        x = x + self.attn(h, h, h)
        return x + self.mlp(self.norm2(x))

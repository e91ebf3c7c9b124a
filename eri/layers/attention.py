"""Multi-head attention twice: with explicit scores, and without ever holding them.

Both have the same projections, call and state dict, so weights move freely between the two.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from eri.layers.checks import check_divides, shape_error
from eri.layers.dropout import Dropout
from eri.layers.heads import merge_heads, split_heads
from eri.layers.linear import Linear
from eri.layers.mask import attention_mask, causal_mask

__all__ = ["FlashAttention", "MultiHeadAttention"]


class MultiHeadAttention(nn.Module):
    """softmax(Q Kᵀ / √D + mask) V over `num_heads` heads of width D = embed_dim / num_heads.

    The scores exist as a tensor `[B, H, Q, K]`; softmax runs in float32 at least. In training,
    dropout acts on the attention weights. `q_proj`, `k_proj`, `v_proj` and `out_proj` are
    embed_dim × embed_dim.

    Source: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, section 3.2.
    Seed rows: A06, A90–A99.

    Args:
        embed_dim: E, the width of inputs and output.
        num_heads: number of heads.
        dropout: probability that an attention weight is dropped in training.
        bias: whether the four projections have a bias.

    Raises:
        ValueError: `embed_dim` is not divisible by `num_heads`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_divides(self, "num_heads", num_heads, "embed_dim", embed_dim)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.q_proj = Linear(embed_dim, embed_dim, bias, device=device, dtype=dtype)
        self.k_proj = Linear(embed_dim, embed_dim, bias, device=device, dtype=dtype)
        self.v_proj = Linear(embed_dim, embed_dim, bias, device=device, dtype=dtype)
        self.out_proj = Linear(embed_dim, embed_dim, bias, device=device, dtype=dtype)
        self.dropout = Dropout(dropout)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend from `query` to `key`.

        Args:
            query: `[B, Q, E]`.
            key: `[B, K, E]`.
            value: `[B, K, E]`.
            mask: `[Q, K]`, `[B, Q, K]` or `[B, H, Q, K]`, sizes of 1 broadcast. Bool or integer:
                non-zero sees; float: added to the scores. A query that sees no key gives zeros
                before the output projection.
            is_causal: query i sees the keys 0 … i only, in addition to `mask`.

        Returns:
            `[B, Q, E]`.

        Raises:
            ValueError: an input or the mask has another shape.
        """
        batch, keys = query.shape[0], key.shape[1:2]
        for name, x, length in (
            ("query", query, query.shape[1:2]),
            ("key", key, keys),
            ("value", value, keys),
        ):
            if x.shape != (batch, *length, self.embed_dim):
                sizes = ", ".join(map(str, length)) or "T"
                raise shape_error(self, x, f"[{batch}, {sizes}, {self.embed_dim}] for {name}")
        q = split_heads(self.q_proj(query), self.num_heads)
        k = split_heads(self.k_proj(key), self.num_heads)
        v = split_heads(self.v_proj(value), self.num_heads)
        return self.out_proj(merge_heads(self._attend(q, k, v, mask, is_causal)))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """`[B, H, Q, D]` from q `[B, H, Q, D]` and k, v `[B, H, K, D]`."""
        if mask is None and is_causal:
            mask, is_causal = causal_mask(q.shape[2], k.shape[2], q.device), False
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        blind = None
        if mask is not None:
            mask, blind = attention_mask(mask, is_causal, q, k)
            if mask.is_floating_point():
                scores = scores + mask
            else:
                scores = scores.masked_fill(~mask, -torch.inf)
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
        out = self.dropout(weights).to(v.dtype) @ v
        return out if blind is None else out.masked_fill(blind, 0.0)

    def extra_repr(self) -> str:
        """Width and heads; the projections print themselves."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"


class FlashAttention(MultiHeadAttention):
    """`MultiHeadAttention` whose scores never exist as a tensor: memory grows with Q + K.

    The computation is PyTorch's fused scaled dot-product attention, which has kernels of linear
    memory for float16, bfloat16 and float32 on CUDA and for the CPU. A given mask is a tensor of
    its own size, so a mask of Q × K numbers brings that size back.

    Source: Dao et al., "FlashAttention", arXiv 2205.14135.
    Seed rows: A06, A100–A103.

    Args:
        embed_dim: E, the width of inputs and output.
        num_heads: number of heads.
        dropout: must be 0; dropout on weights that are never held is not supported.
        bias: whether the four projections have a bias.

    Raises:
        ValueError: `dropout` is not 0, or `embed_dim` is not divisible by `num_heads`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dropout != 0:
            raise ValueError(f"FlashAttention: dropout is not supported, expected 0, got {dropout}")
        super().__init__(embed_dim, num_heads, 0.0, bias, device=device, dtype=dtype)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        mask, blind = attention_mask(mask, is_causal, q, k)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.masked_fill(blind, 0.0)

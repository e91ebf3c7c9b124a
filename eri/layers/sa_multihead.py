"""Causal self-attention with rotary positions."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.types import Device

from eri.layers.checks import shape_error
from eri.layers.heads import merge_heads, split_heads
from eri.layers.init import XAVIER_NORMAL_LINEAR, Initializer
from eri.layers.linear import Linear
from eri.layers.rope import apply_rope
from eri.layers.weights import OwnsWeights, Provider

__all__ = ["SAMultiHead"]


class SAMultiHead(OwnsWeights):
    """softmax(R(Q) R(K)ᵀ / √D + causal mask) V over heads of width D, with R the rotation of RoPE.

    Position t sees the positions 0 … t. There are no biases and no output projection. `q`, `k` and
    `v` are linear layers whose weights `[features, features]` a provider sees as they are.

    Source: Vaswani et al., arXiv 1706.03762; Su et al., arXiv 2104.09864.
    Seed rows: B45–B49.

    Args:
        features_count: width of input and output.
        head_size: D, even.
        heads_count: number of heads.
        context_length: the longest sequence that is accepted.
        init_weights: fills the three weights, with both fans equal to `features_count`.
        provide_weights: called by `load_from_provider` with the weights of q, k and v.

    Raises:
        ValueError: `heads_count · head_size` is not `features_count`, or `head_size` is odd.
    """

    def __init__(
        self,
        features_count: int,
        head_size: int,
        heads_count: int,
        context_length: int,
        *,
        init_weights: Initializer = XAVIER_NORMAL_LINEAR,
        provide_weights: Provider | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if heads_count * head_size != features_count:
            raise ValueError(
                f"SAMultiHead: heads_count · head_size = {heads_count} · {head_size} "
                f"is not features_count = {features_count}"
            )
        if head_size % 2:
            raise ValueError(f"SAMultiHead: head_size must be even for RoPE, found {head_size}")
        self.features_count = features_count
        self.heads_count = heads_count
        self.context_length = context_length
        self.provide_weights = provide_weights

        def projection() -> Linear:
            linear = Linear(features_count, features_count, False, device=device, dtype=dtype)
            init_weights.fill(linear.weight, features_count, features_count)
            return linear

        self.q = projection()
        self.k = projection()
        self.v = projection()

    def forward(self, x: Tensor) -> Tensor:
        """Attend within `[..., T, features_count]`, T ≤ context_length; the shape is kept.

        Raises:
            ValueError: the width differs or the sequence is too long.
        """
        fits = x.dim() >= 2 and x.shape[-1] == self.features_count
        if not fits or x.shape[-2] > self.context_length:
            expected = f"[..., T ≤ {self.context_length}, {self.features_count}]"
            raise shape_error(self, x, expected)
        q = apply_rope(split_heads(self.q(x), self.heads_count))
        k = apply_rope(split_heads(self.k(x), self.heads_count))
        v = split_heads(self.v(x), self.heads_count)
        return merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def extra_repr(self) -> str:
        """Heads and longest sequence; the projections print themselves."""
        return f"heads_count={self.heads_count}, context_length={self.context_length}"

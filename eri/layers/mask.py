"""What an attention mask means, in one place.

A bool or integer mask keeps: True or non-zero lets a query see a key. A float mask is added to
the scores. A mask is `[Q, K]`, `[B, Q, K]` or `[B, H, Q, K]`, and a size may be 1 to broadcast. A
causal mask lets query i see the keys 0 … i, aligned at the top left when Q and K differ, and hides
in addition to what the given mask hides. A query that sees no key at all gets an output of zeros.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["AttentionMask", "attention_mask", "causal_mask"]


class AttentionMask(NamedTuple):
    """A mask that softmax can take, and what to do afterwards.

    Args:
        mask: bool (True sees) or additive, broadcastable to `[B, H, Q, K]`; every row sees a key.
        blind: bool `[..., Q, 1]`, the queries that saw no key; their outputs are to be zeroed.
    """

    mask: Tensor
    blind: Tensor


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Bool `[queries, keys]`, True where key ≤ query."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()


def attention_mask(mask: Tensor, is_causal: bool, q: Tensor, k: Tensor) -> AttentionMask:
    """Read a caller's mask for queries `[B, H, Q, D]` and keys `[B, H, K, D]`.

    Seed rows: A94–A98.

    Raises:
        ValueError: the mask's shape does not fit.
    """
    mask = _four_dimensional(mask, (*q.shape[:3], k.shape[2]))
    causal = causal_mask(q.shape[2], k.shape[2], q.device) if is_causal else None
    if mask.is_floating_point():
        added = mask.to(q.dtype)
        if causal is not None:
            added = added.masked_fill(~causal, -torch.inf)
        blind = (added == -torch.inf).all(-1, keepdim=True)
        return AttentionMask(added.masked_fill(blind, 0.0), blind)
    seen = mask != 0
    if causal is not None:
        seen = seen & causal
    blind = ~seen.any(-1, keepdim=True)
    return AttentionMask(seen | blind, blind)


def _four_dimensional(mask: Tensor, scores: tuple[int, ...]) -> Tensor:
    shape = list(mask.shape)
    if mask.dim() == 2:
        mask = mask[None, None]
    elif mask.dim() == 3:
        mask = mask[:, None]
    fits = mask.dim() == 4 and all(
        found in (1, size) for found, size in zip(mask.shape, scores, strict=True)
    )
    if not fits:
        b, h, q, k = scores
        raise ValueError(
            f"attention mask: expected [{q}, {k}], [{b}, {q}, {k}] or [{b}, {h}, {q}, {k}] "
            f"with any size 1 to broadcast, found {shape}"
        )
    return mask

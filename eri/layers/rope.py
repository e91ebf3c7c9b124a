"""Rotary position embedding."""

import torch
from torch import Tensor

__all__ = ["apply_rope"]


def apply_rope(x: Tensor, *, base: float = 10000.0) -> Tensor:
    """Rotate the pair (2i, 2i + 1) of the row at position p by the angle p · base^(-2i / D).

    Positions count from 0. Neighbouring features make a pair; models that pair feature i with
    i + D/2 have another layout of the same idea. Lengths are kept, and the product of two rotated
    rows depends on the distance of their positions alone. Angles are computed in float32 at least.

    Source: Su et al., "RoFormer", arXiv 2104.09864, section 3.4.2.
    Seed rows: B46.

    Args:
        x: `[..., T, D]`.
        base: the angles' base.

    Returns:
        The shape and dtype of `x`.

    Raises:
        ValueError: D is odd.
    """
    length, width = x.shape[-2:]
    if width % 2:
        raise ValueError(f"apply_rope: expected an even head size, found {width}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    exponents = torch.arange(0, width, 2, device=x.device, dtype=dtype) / width
    positions = torch.arange(length, device=x.device, dtype=dtype)
    angles = positions[:, None] * base**-exponents  # [T, D/2]
    cos, sin = angles.cos(), angles.sin()
    first, second = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)

r"""Rotary positions: every pair of features turns by an angle that grows with the position.

$$y_{2i} = x_{2i} \cos a - x_{2i+1} \sin a,\quad y_{2i+1} = x_{2i} \sin a + x_{2i+1} \cos a,\quad
a = p\,b^{-2i/D}$$

at position p of the base b; the gradient of x is that of y, turned back. Fused are angles, sines
and rotation: x is read once and y written, 4 bytes an element in 16 bits. Sequences share the sines
of their positions.

Source: Su et al., "RoFormer", arXiv 2104.09864, section 3.4.2.

Limits of the kernel: sm_80 or newer; float32, float16 or bfloat16; D a multiple of 8, or of 4 in
float32; fewer than 2²⁴ positions; fewer than 2³¹ elements of a sequence, and sequences. Heads that
lie apart, as `split_heads` gives them, are read where they are; features with gaps are copied.
Programs of `torch.compile`, which fuses by itself, take PyTorch's own operations.

Measured with `pytest -s -m gpu tests/layers/test_rope.py -k bandwidth`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from eri.layers.backend import use_kernel
from eri.layers.vectors import VECTOR, aligned, unsupported_type

__all__ = ["apply_rope", "rope_reference", "unsupported"]

MOST_POSITIONS = 2**24
MOST_ELEMENTS = 2**31


def rope_reference(x: Tensor, base: float, inverse: bool) -> Tensor:
    """What `rope` is, in PyTorch's own operations."""
    length, width = x.shape[-2:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    exponents = torch.arange(0, width, 2, device=x.device, dtype=dtype) / width
    positions = torch.arange(length, device=x.device, dtype=dtype)
    angles = positions[:, None] * base**-exponents  # [T, D/2]
    cos, sin = angles.cos(), -angles.sin() if inverse else angles.sin()
    first, second = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def unsupported(x: Tensor) -> str | None:
    """Why the kernel cannot rotate x `[..., T, D]`, in words; None where it can."""
    if (reason := unsupported_type("x", x)) is not None:
        return reason
    (length, width), vector = x.shape[-2:], VECTOR // x.element_size()
    if width % vector:
        return f"x has heads of {width} elements, not a multiple of {vector}"
    if not x.numel():
        return "x has no elements"
    if length >= MOST_POSITIONS or length * width >= MOST_ELEMENTS:
        return f"x has {length} positions of {width} elements, too many"
    if x.numel() // (length * width) >= MOST_ELEMENTS:
        return f"x has {x.numel() // (length * width)} sequences, too many"
    return None


LIBRARY = Library("eri", "FRAGMENT")
LIBRARY.define(
    "rope(Tensor x, float base, bool inverse) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


@torch.library.impl(LIBRARY, "rope", "CPU")
def _rope_on_cpu(x: Tensor, base: float, inverse: bool) -> Tensor:
    return rope_reference(x, base, inverse).contiguous()


@torch.library.register_fake("eri::rope", lib=LIBRARY)
def _rope_fake(x: Tensor, base: float, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, float, bool], output: Tensor) -> None:
    _, ctx.base, ctx.inverse = inputs


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return _rotate(dy, ctx.base, not ctx.inverse), None, None


torch.library.register_autograd("eri::rope", _backward, setup_context=_keep, lib=LIBRARY)


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
        ConfigError: the backend is `cuda` and the kernel cannot be used.
    """
    _, width = x.shape[-2:]
    if width % 2:
        raise ValueError(f"apply_rope: expected an even head size, found {width}")
    if torch.compiler.is_compiling():
        return rope_reference(x, base, False)
    return _rotate(x, base, False)


def _rotate(x: Tensor, base: float, inverse: bool) -> Tensor:
    if not use_kernel("rope", x.device, lambda: unsupported(x)):
        return rope_reference(x, base, inverse)
    return torch.ops.eri.rope(_heads(x), base, inverse).view(x.shape)


def _heads(x: Tensor) -> Tensor:
    """x as `[B, H, T, D]` and as the kernel reads it; copied only if it lies otherwise."""
    x = x.flatten(0, -4) if x.dim() > 4 else x[(None,) * (4 - x.dim())]
    vector = VECTOR // x.element_size()
    steps = [step for size, step in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    if x.stride(3) != 1 or any(step % vector for step in steps):
        x = x.contiguous()
    return aligned(x)

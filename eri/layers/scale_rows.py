r"""Rows times a weight, divided by their root mean square before: RMSNorm; or not: MulRows.

$$y = z \odot w,\quad z = x\,\rho,\quad \rho = (\overline{x^2} + \epsilon)^{-1/2}$$

over the last dimension, ρ = 1 without a norm and w = 1 without a weight; and with $g = w \odot dy$

$$dx = \rho\,(g - z\,\overline{g \odot z}),\quad dw = \sum_{rows} dy \odot z$$

where without a norm dx = g. Fused is each of the two: a row is read once and y written, 4 bytes an
element in 16 bits; backward dy and x are read and dx written, 6 bytes, and the weight's gradient is
summed on the way. Nothing but x is kept. Sums are float32 and have one order, so equal inputs give
equal bits.

Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.

Limits of the kernels: sm_80 or newer; float32, float16 or bfloat16, the weight too; rows of a
multiple of 8 elements, at most 8192, or of 4 and at most 4096 in float32. Inputs whose rows are not
at one stride of a multiple of 16 bytes are copied. A gradient that is differentiated again, and
programs of `torch.compile`, which fuses by itself, take PyTorch's own operations.

Measured with `pytest -s -m gpu tests/layers/test_scale_rows.py -k bandwidth`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library

from eri.layers.backend import use_kernel
from eri.layers.vectors import VECTOR, aligned, aligned_rows, type_name, unsupported_type

__all__ = [
    "mul_rows",
    "rms_norm",
    "scale_rows_backward_reference",
    "scale_rows_reference",
    "unsupported",
]

MOST_VECTORS = 1024  # of a row
MOST_ROWS = 2**31


def scale_rows_reference(x: Tensor, weight: Tensor | None, eps: float | None) -> Tensor:
    """What `scale_rows` is, in PyTorch's own operations; without eps there is no norm."""
    if eps is not None:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return x.clone() if weight is None else x * weight


def scale_rows_backward_reference(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of a weight, in PyTorch's own operations."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    dy, z = dy.to(dtype), x.to(dtype)
    g = dy if weight is None else dy * weight
    if eps is None:
        dx = g
    else:
        rms = (z.square().mean(-1, keepdim=True) + eps).rsqrt()
        z = z * rms
        dx = rms * (g - z * (g * z).mean(-1, keepdim=True))
    dw = (dy * z).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype), dw.to(x.dtype)


def unsupported(x: Tensor, weight: Tensor | None) -> str | None:
    """Why the kernels cannot take x and its weight, in words; None where they can."""
    if (reason := unsupported_type("x", x)) is not None:
        return reason
    if weight is not None and weight.dtype != x.dtype:
        return f"x is {type_name(x.dtype)}, and its weight {type_name(weight.dtype)}"
    width, vector = x.shape[-1], VECTOR // x.element_size()
    if width % vector or not 0 < width <= vector * MOST_VECTORS:
        most = vector * MOST_VECTORS
        return f"x has rows of {width} elements, not a multiple of {vector} up to {most}"
    if not 0 < x.numel() // width < MOST_ROWS:
        return f"x has {x.numel() // width} rows, not 1 to {MOST_ROWS - 1}"
    return None


LIBRARY = Library("eri", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define("scale_rows(Tensor x, Tensor? weight, float? eps) -> Tensor", tags=TAGS)
LIBRARY.define(
    "scale_rows_backward(Tensor dy, Tensor x, Tensor? weight, float? eps, bool of_weight)"
    " -> (Tensor, Tensor)",
    tags=TAGS,
)


@torch.library.impl(LIBRARY, "scale_rows", "CPU")
def _scale_rows_on_cpu(x: Tensor, weight: Tensor | None, eps: float | None) -> Tensor:
    return scale_rows_reference(x, weight, eps).contiguous()


@torch.library.impl(LIBRARY, "scale_rows_backward", "CPU")
def _scale_rows_backward_on_cpu(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float | None, of_weight: bool
) -> tuple[Tensor, Tensor]:
    dx, dw = scale_rows_backward_reference(dy, x, weight, eps)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format).copy_(dx)  # never dy itself
    return dx, dw if of_weight else x.new_empty(0)


@torch.library.register_fake("eri::scale_rows", lib=LIBRARY)
def _scale_rows_fake(x: Tensor, weight: Tensor | None, eps: float | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("eri::scale_rows_backward", lib=LIBRARY)
def _scale_rows_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float | None, of_weight: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if of_weight else 0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
    x, weight = ctx.saved_tensors
    of_weight = ctx.needs_input_grad[1]
    again = torch.is_grad_enabled()  # the gradient is differentiated, too
    if not again and use_kernel(_name(ctx.eps), x.device, lambda: unsupported(x, weight)):
        rows = aligned_rows(dy), aligned_rows(x), _dense(weight)
        dx, dw = torch.ops.eri.scale_rows_backward(*rows, ctx.eps, of_weight)
    else:
        dx, dw = scale_rows_backward_reference(dy, x, weight, ctx.eps)
    return dx, dw if of_weight else None, None


torch.library.register_autograd("eri::scale_rows", _backward, setup_context=_keep, lib=LIBRARY)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Rows `[..., D]` divided by √(mean(x²) + eps), times a weight `[D]` if there is one.

    Raises:
        ConfigError: the backend is `cuda` and the kernel cannot be used.
    """
    return _scale_rows(x, weight, eps)


def mul_rows(x: Tensor, weight: Tensor) -> Tensor:
    """Rows `[..., D]` times a weight `[D]`.

    Raises:
        ConfigError: the backend is `cuda` and the kernel cannot be used.
    """
    return _scale_rows(x, weight, None)


def _scale_rows(x: Tensor, weight: Tensor | None, eps: float | None) -> Tensor:
    if torch.compiler.is_compiling() or not use_kernel(
        _name(eps), x.device, lambda: _unsupported_here(x, weight, eps)
    ):
        return scale_rows_reference(x, weight, eps)
    return torch.ops.eri.scale_rows(aligned_rows(x), _dense(weight), eps)


def _unsupported_here(x: Tensor, weight: Tensor | None, eps: float | None) -> str | None:
    """The same, where PyTorch may choose types by itself."""
    reason = unsupported(x, weight)
    if reason is None and eps is not None and x.dtype != torch.float32:
        if torch.is_autocast_enabled(x.device.type):
            return "autocast computes it in float32"
    return reason


def _name(eps: float | None) -> str:
    """What is computed, for messages."""
    return "mul_rows" if eps is None else "rms_norm"


def _dense(weight: Tensor | None) -> Tensor | None:
    """The weight as the kernels read it; a copy only where it lies otherwise."""
    return None if weight is None else aligned(weight.contiguous())

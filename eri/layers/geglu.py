r"""The gate of a transformer's feed-forward, forward and backward, keeping its input alone.

$$a = v \odot \mathrm{gelu}(g),\quad [v, g] = u,\quad \mathrm{gelu}(g) = g\,\Phi(g)$$

with the exact Φ (erf), and

$$dv = da \odot \mathrm{gelu}(g),\quad dg = da \odot v \odot (\Phi(g) + g\,\varphi(g))$$

Fused is each of the two: u is read once and a written once, 6 bytes an element of a in 16 bits;
backward da and u are read, du and a written, 12 bytes: the gradients of the product that follows
need a once more. Neither φ(g) nor gelu(g) is kept. Behind the rows of a and du a tail can be left,
see `eri/layers/vectors.py`.

Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202, section 2.

Limits of the kernels: sm_80 or newer; float32, float16 or bfloat16; W and the tail multiples of 8,
or of 4 in float32; less than 2³⁴ elements. Inputs whose rows are not at one stride of a multiple of
16 bytes are copied.

Measured with `pytest -s -m gpu tests/layers/test_geglu.py -k bandwidth`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library

from eri.layers.backend import use_kernel
from eri.layers.vectors import (
    VECTOR,
    aligned_rows,
    unsupported_tail,
    unsupported_type,
    with_tail,
)

__all__ = ["geglu", "geglu_backward", "geglu_backward_reference", "geglu_reference", "unsupported"]

MOST_ELEMENTS = 2**34


def geglu_reference(u: Tensor) -> Tensor:
    """What `geglu` is, in PyTorch's own operations."""
    value, gate = u.chunk(2, dim=-1)
    return F.gelu(gate) * value


def geglu_backward_reference(da: Tensor, u: Tensor) -> Tensor:
    """What `geglu_backward` is, in PyTorch's own operations."""
    value, gate = u.chunk(2, dim=-1)
    du = torch.empty_like(u, memory_format=torch.contiguous_format)
    d_value, d_gate = du.chunk(2, dim=-1)
    torch.mul(da, F.gelu(gate), out=d_value)
    torch.ops.aten.gelu_backward.grad_input(da * value, gate, grad_input=d_gate)
    return du


def unsupported(u: Tensor, tail: int = 0) -> str | None:
    """Why the kernels cannot take u or leave such a tail, in words; None where they can."""
    if (reason := unsupported_type("u", u)) is not None:
        return reason
    vector = VECTOR // u.element_size()
    if u.shape[-1] % (2 * vector):
        return f"u has rows of {u.shape[-1]} elements, not a multiple of {2 * vector}"
    if not 0 < u.numel() < MOST_ELEMENTS:
        return f"u has {u.numel()} elements, not 1 to {MOST_ELEMENTS - 1}"
    return unsupported_tail(tail, u)


LIBRARY = Library("eri", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define("geglu(Tensor u, int tail) -> Tensor", tags=TAGS)
LIBRARY.define("geglu_backward(Tensor da, Tensor u, int tail) -> (Tensor, Tensor)", tags=TAGS)


@torch.library.impl(LIBRARY, "geglu", "CPU")
def _geglu_on_cpu(u: Tensor, tail: int) -> Tensor:
    return with_tail(geglu_reference(u).contiguous(), tail)


@torch.library.impl(LIBRARY, "geglu_backward", "CPU")
def _geglu_backward_on_cpu(da: Tensor, u: Tensor, tail: int) -> tuple[Tensor, Tensor]:
    du = geglu_backward_reference(_like_values(da, u), u)
    return with_tail(du, tail), _geglu_on_cpu(u, 0)


@torch.library.register_fake("eri::geglu", lib=LIBRARY)
def _geglu_fake(u: Tensor, tail: int) -> Tensor:
    return u.new_empty((u.numel() // u.shape[-1], u.shape[-1] // 2 + tail))


@torch.library.register_fake("eri::geglu_backward", lib=LIBRARY)
def _geglu_backward_fake(da: Tensor, u: Tensor, tail: int) -> tuple[Tensor, Tensor]:
    rows = u.numel() // u.shape[-1]
    return u.new_empty((rows, u.shape[-1] + tail)), u.new_empty((rows, u.shape[-1] // 2))


def _like_values(da: Tensor, u: Tensor) -> Tensor:
    """The gradient of a in the shape of the values of u."""
    return da.reshape(*u.shape[:-1], u.shape[-1] // 2)


def _keep(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, da: Tensor) -> tuple[Tensor, None]:
    (u,) = ctx.saved_tensors
    return geglu_backward(da[:, : u.shape[-1] // 2], u)[0], None


torch.library.register_autograd("eri::geglu", _backward, setup_context=_keep, lib=LIBRARY)


def geglu(u: Tensor, tail: int = 0) -> Tensor:
    """`[..., 2·W]`, values and gates, to `[..., W]`; with a tail to `[rows, W + tail]`.

    Raises:
        ConfigError: the backend is `cuda` and the kernel cannot be used.
    """
    if use_kernel("geglu", u.device, lambda: unsupported(u, tail)):
        a = torch.ops.eri.geglu(aligned_rows(u), tail)
    else:
        a = with_tail(geglu_reference(u), tail)
    return a if tail else a.view(*u.shape[:-1], u.shape[-1] // 2)


def geglu_backward(da: Tensor, u: Tensor, tail: int = 0) -> tuple[Tensor, Tensor]:
    """The gradient of u `[..., 2·W]` from that of a, with its rows; and a once more.

    Both are without a gradient of their own.

    Returns:
        Like u, with a tail `[rows, 2·W + tail]`; and `[rows, W]`.

    Raises:
        ConfigError: the backend is `cuda` and the kernel cannot be used.
    """
    if use_kernel("geglu", u.device, lambda: unsupported(u, tail)):
        du, a = torch.ops.eri.geglu_backward(aligned_rows(da), aligned_rows(u), tail)
    else:
        du = with_tail(geglu_backward_reference(_like_values(da, u), u), tail)
        a = with_tail(geglu_reference(u), 0)
    return du if tail else du.view(u.shape), a

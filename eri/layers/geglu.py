r"""The gate of a transformer's feed-forward, forward and backward, keeping its input alone.

$$a = v \odot \mathrm{gelu}(g),\quad [v, g] = u,\quad \mathrm{gelu}(g) = g\,\Phi(g)$$

with the exact Φ (erf), and

$$dv = da \odot \mathrm{gelu}(g),\quad dg = da \odot v \odot (\Phi(g) + g\,\varphi(g))$$

Fused is each of the two: u is read once and a written once, 6 bytes an element of a in 16 bits;
backward da and u are read and du written, 10 bytes. Neither φ(g) nor gelu(g) is kept.

Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202, section 2.

Limits of the kernels: sm_80 or newer; float32, float16 or bfloat16; W a multiple of 8, or of 4 in
float32; less than 2³⁴ elements. Inputs that are not contiguous are copied.

Measured with `pytest -s -m gpu tests/layers/test_geglu.py -k bandwidth`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library

from eri.layers.backend import use_kernel
from eri.layers.vectors import VECTOR, aligned_rows, unsupported_type

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


def unsupported(u: Tensor) -> str | None:
    """Why the kernels cannot take u, in words; None where they can."""
    if (reason := unsupported_type("u", u)) is not None:
        return reason
    vector = VECTOR // u.element_size()
    if u.shape[-1] % (2 * vector):
        return f"u has rows of {u.shape[-1]} elements, not a multiple of {2 * vector}"
    if not 0 < u.numel() < MOST_ELEMENTS:
        return f"u has {u.numel()} elements, not 1 to {MOST_ELEMENTS - 1}"
    return None


LIBRARY = Library("eri", "FRAGMENT")
LIBRARY.define("geglu(Tensor u) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define("geglu_backward(Tensor da, Tensor u) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl(LIBRARY, "geglu", "CPU")
def _geglu_on_cpu(u: Tensor) -> Tensor:
    return geglu_reference(u).contiguous()


@torch.library.impl(LIBRARY, "geglu_backward", "CPU")
def _geglu_backward_on_cpu(da: Tensor, u: Tensor) -> Tensor:
    return geglu_backward_reference(da, u)


@torch.library.register_fake("eri::geglu", lib=LIBRARY)
def _geglu_fake(u: Tensor) -> Tensor:
    return u.new_empty((*u.shape[:-1], u.shape[-1] // 2))


@torch.library.register_fake("eri::geglu_backward", lib=LIBRARY)
def _geglu_backward_fake(da: Tensor, u: Tensor) -> Tensor:
    return torch.empty_like(u, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, da: Tensor) -> Tensor:
    return geglu_backward(da, *ctx.saved_tensors)


torch.library.register_autograd("eri::geglu", _backward, setup_context=_keep, lib=LIBRARY)


def geglu(u: Tensor) -> Tensor:
    """`[..., 2·W]`, values and gates, to `[..., W]`.

    Raises:
        ConfigError: the backend is `cuda` and the kernel cannot be used.
    """
    if use_kernel("geglu", u.device, lambda: unsupported(u)):
        return torch.ops.eri.geglu(aligned_rows(u))
    return geglu_reference(u)


def geglu_backward(da: Tensor, u: Tensor) -> Tensor:
    """The gradient of u `[..., 2·W]` from that of a `[..., W]`; without a gradient of its own.

    Raises:
        ConfigError: the backend is `cuda` and the kernel cannot be used.
    """
    if use_kernel("geglu", u.device, lambda: unsupported(u)):
        return torch.ops.eri.geglu_backward(aligned_rows(da), aligned_rows(u))
    return geglu_backward_reference(da, u)

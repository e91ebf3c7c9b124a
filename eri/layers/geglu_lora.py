r"""The gate's backward pass, and beside it what LoRA makes of what it reads and writes.

Of the layer after the gate, y = a Wᵀ + H Bᵀ, the gradient of A; of the layer before it that of B,
and P, which the rest of its backward pass needs:

$$\Delta A = P^T a,\quad \Delta B = du^T H,\quad P = s\,du\,B$$

with a and du as `eri.layers.geglu` has them, P and H as `eri.layers.lora_products`. The first two
are sums over the tokens: a block that takes some columns of all tokens holds its part of them in
registers while values, gates and gradients pass by. So a, which only these sums read, is never
written, and du is not read again: 10 bytes an element of a in 16 bits instead of 22. P is a sum
over the columns, of which every 64 leave a part in float32; they are added up after that. The
numbers that are multiplied are rounded to 16 bits like those that are written; sums are float32, in
an order that depends on shapes and card alone. The first two are added onto the parameters'
gradients.

Sources: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202; Hu et al., "LoRA", arXiv
2106.09685.

Limits of the kernels: sm_80 or newer; float16 or bfloat16; ranks of up to 16, padded to 8 or 16; W
a multiple of 8; less than 2²⁸ rows. Whatever else is asked is made by one kernel after the other.

Measured with `pytest -s -m gpu tests/layers/test_geglu_lora.py -k bandwidth`.
"""

import torch
from torch import Tensor
from torch.library import Library

from eri.layers.backend import kernels_ready
from eri.layers.geglu import geglu_backward, geglu_backward_reference, geglu_reference
from eri.layers.geglu import unsupported as unsupported_gate
from eri.layers.lora_products import (
    Gradient,
    Narrow,
    lora_down,
    lora_down_reference,
    lora_gradient,
    lora_gradient_reference,
)
from eri.layers.lora_products import unsupported as unsupported_product
from eri.layers.vectors import aligned_rows, with_tail

__all__ = ["geglu_backward_lora", "geglu_backward_lora_reference", "unsupported"]

MOST_RANKS = 16
MOST_ROWS = 2**28


def geglu_backward_lora_reference(  # noqa: PLR0917 - the signature of the op
    da: Tensor,
    u: Tensor,
    p: Tensor,
    h: Tensor,
    d_down: Tensor,
    d_up: Tensor,
    up: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """What `geglu_backward_lora` is, in PyTorch's own operations."""
    du = geglu_backward_reference(da, u)
    for one in _gradients(du, geglu_reference(u), p, h, d_down, d_up):
        lora_gradient_reference(*one)
    du = with_tail(du, len(up)).contiguous()
    return du, lora_down_reference(du, up, 1, scale)


def _gradients(  # noqa: PLR0917 - all there is
    du: Tensor, a: Tensor, p: Tensor, h: Tensor, d_down: Tensor, d_up: Tensor
) -> tuple[Gradient, Gradient]:
    """Both, each without what its layer's other matrix has."""
    no_up, no_down = d_down.new_empty(1, 0, len(d_down)), d_up.new_empty(d_up.shape[1], 0)
    return Gradient(a[:, :0], a, p, p, d_down, no_up), Gradient(
        du, du[:, :0], h, h, no_down, d_up[None]
    )


def unsupported(  # noqa: PLR0917 - the signature of the op
    da: Tensor, u: Tensor, p: Tensor, h: Tensor, d_down: Tensor, d_up: Tensor, up: Tensor
) -> str | None:
    """Why the kernels cannot take these, in words; None where they can."""
    if u.dtype not in {torch.float16, torch.bfloat16}:
        return "rows are not float16 or bfloat16"
    if len(u) >= MOST_ROWS:
        return f"there are {len(u)} rows, not less than {MOST_ROWS}"
    if (reason := unsupported_gate(u, len(up))) is not None:
        return reason
    for name, small, total in ("p", p, {"d_down": d_down}), ("h", h, {"d_up": d_up}):
        ranks = small.shape[1]
        if ranks > MOST_RANKS:
            return f"{name} has {ranks} columns, not at most {MOST_RANKS}"
        if (reason := unsupported_product(ranks, total, u=u, p=small, up=up)) is not None:
            return reason
    return None


LIBRARY = Library("eri", "FRAGMENT")
LIBRARY.define(
    "geglu_backward_lora(Tensor da, Tensor u, Tensor p, Tensor h, Tensor(a!) d_down,"
    " Tensor(b!) d_up, Tensor up, float scale) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl(LIBRARY, "geglu_backward_lora", "CPU")(geglu_backward_lora_reference)


@torch.library.register_fake("eri::geglu_backward_lora", lib=LIBRARY)
def _geglu_backward_lora_fake(  # noqa: PLR0917 - the signature of the op
    da: Tensor,
    u: Tensor,
    p: Tensor,
    h: Tensor,
    d_down: Tensor,
    d_up: Tensor,
    up: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return u.new_empty((u.shape[0], u.shape[1] + len(up))), u.new_empty((u.shape[0], len(up)))


def geglu_backward_lora(  # noqa: PLR0917 - the signature of the op
    da: Tensor, u: Tensor, p: Tensor, h: Tensor, d_down: Tensor, d_up: Tensor, narrow: Narrow
) -> tuple[Tensor, Tensor]:
    """The gradient of u from that of a, and P of it; gradients of two matrices, which are added.

    Args:
        da: `[T, W]`; all rows may lie further apart.
        u: values and gates, `[T, 2·W]`.
        p: P of the layer that reads a, `[T, rp]`: r columns and padding.
        h: H of the layer that gave u, likewise.
        d_down: of A of the first, float32 `[r, W]`.
        d_up: of B of the second, float32 `[2·W, r]`.
        narrow: what makes P of du, with as many ranks as h.

    Returns:
        du with P behind it, `[T, 2·W + rp]`; P `[T, rp]`.

    Raises:
        ConfigError: the backend is `cuda` and a kernel cannot be used.
    """
    up, groups, scale = narrow
    if groups == 1 and kernels_ready(u.device):
        given = aligned_rows(da), aligned_rows(u), p, h, d_down, d_up, up
        if unsupported(*given) is None:
            return torch.ops.eri.geglu_backward_lora(*given, scale)
    du, a = geglu_backward(da, u, len(up))
    for one in _gradients(du[:, : u.shape[1]], a, p, h, d_down, d_up):
        lora_gradient(*one)
    return du, lora_down(du, *narrow)

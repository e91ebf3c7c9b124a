r"""The skinny products of low-rank updates: H or P of some rows, and the gradients of A and B.

For n layers side by side on the same input x `[T, K]`, with $y = x W^T + H B^T$,

$$H = s\,x A^T,\quad P = s\,dy\,B,\quad \Delta A = P^T x,\quad \Delta B = dy^T H$$

where P and ΔB take each layer's own columns of dy. `lora_down` writes H or P twice: compact, and
into columns that its rows have left behind their numbers (their "tail"), so that one matrix product
over `[x | H]` with `[W | B]` gives y, and one over `[dy | P]` with `[W; A]` dx. `lora_gradient`
adds ΔA and ΔB in float32 straight onto the parameters' gradients.

Fused are: in the first, all groups of columns and both copies; in the second, both products of all
layers, the sum over parts of T, and the addition. Each is one launch, which takes up to four of the
second. `lora_down` reads its rows once for up to 48 ranks of a group: 2 T K bytes in 16 bits.
`lora_gradient` reads dy once for every 16 ranks of a layer and x once for every 16 ranks of all, 32
if a layer has more: 2 T (n N + n K) bytes at rank 16, most of the second from the cache. Sums are
float32 and in an order that depends on shapes and card alone, so that equal inputs give equal bits.

Source: Hu et al., "LoRA", arXiv 2106.09685; adding onto gradients: Shoeybi et al., "Megatron-LM",
arXiv 1909.08053.

Limits of the kernels: sm_80 or newer; float32, float16 or bfloat16 (float32 without tensor cores);
rows, widths and beginnings at multiples of 16 bytes; ranks padded to a multiple of 8, at most 4096
side by side; less than 2³⁰ rows.

Measured with `pytest -s -m gpu tests/layers/test_lora_products.py -k bandwidth`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import Library

from eri.layers.backend import kernels_ready, use_kernel
from eri.layers.vectors import VECTOR, type_name, unsupported_type

__all__ = [
    "MOST_RANKS",
    "PADDING",
    "Gradient",
    "Narrow",
    "lora_down",
    "lora_down_reference",
    "lora_gradient",
    "lora_gradient_reference",
    "lora_gradients",
    "unsupported",
]

PADDING = 8  # of a layer's rank
MOST_RANKS = 4096  # of all layers side by side, padded
MOST_ROWS = 2**30  # or columns of a matrix
MOST_GRADIENTS = 4  # of one launch
MOST_TOGETHER = 45_000_000  # numbers that one reads; larger ones have a launch of their own


class Narrow(NamedTuple):
    """What `lora_down` multiplies rows with."""

    down: Tensor
    groups: int
    scale: float


class Gradient(NamedTuple):
    """What `lora_gradient` takes; x or dy, and their sum, have no columns where there is none."""

    dy: Tensor
    x: Tensor
    p: Tensor
    h: Tensor
    d_down: Tensor
    d_up: Tensor


def lora_down_reference(rows: Tensor, down: Tensor, groups: int, scale: float) -> Tensor:
    """What `lora_down` is, in PyTorch's own operations."""
    width = groups * down.shape[1]
    wide = rows[:, :width].unflatten(1, (groups, -1)).transpose(0, 1)
    h = wide @ down.unflatten(0, (groups, -1)).mT
    h = h.transpose(0, 1).flatten(1).mul_(scale)
    if rows.shape[1] > width:
        rows[:, width:] = h
    return h


def lora_gradient_reference(  # noqa: PLR0917 - the signature of the op
    dy: Tensor, x: Tensor, p: Tensor, h: Tensor, d_down: Tensor, d_up: Tensor
) -> None:
    """What `lora_gradient` is, in PyTorch's own operations."""
    layers, _, rank = d_up.shape
    ps, hs = (small.unflatten(1, (layers, -1))[:, :, :rank].transpose(0, 1) for small in (p, h))
    dys = dy.unflatten(1, (layers, -1)).transpose(0, 1)
    for place, d_a in enumerate(d_down.unflatten(0, (layers, -1))):
        _add_product(d_a, ps[place].mT, x)
        _add_product(d_up[place], dys[place].mT, hs[place])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, summed in the type of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def unsupported(ranks: int, totals: dict[str, Tensor], **rows: Tensor) -> str | None:
    """Why the kernels cannot take these, in words; None where they can.

    Args:
        ranks: of a layer, padded.
        totals: float32 sums, by name.
        rows: matrices that are read, by name; the first has the type of all.
    """
    first = next(iter(rows))
    if (reason := unsupported_type(first, rows[first])) is not None:
        return reason
    dtype = rows[first].dtype
    reasons = [
        *(_badly_laid(name, matrix, first, dtype) for name, matrix in rows.items()),
        *(_bad_total(name, total, dtype) for name, total in totals.items()),
    ]
    side_by_side = len(rows["down"]) if "down" in rows else rows["p"].shape[1]
    if ranks == 0 or ranks % PADDING or side_by_side > MOST_RANKS:
        limits = f"a multiple of {PADDING} and at most {MOST_RANKS}"
        reasons.append(f"layers have {ranks} ranks each and {side_by_side} in all, not {limits}")
    return next((reason for reason in reasons if reason is not None), None)


def _badly_laid(name: str, matrix: Tensor, first: str, dtype: torch.dtype) -> str | None:
    if matrix.dtype != dtype:
        return f"{first} is {type_name(dtype)}, and {name} {type_name(matrix.dtype)}"
    vector = VECTOR // matrix.element_size()
    tokens, width = matrix.shape
    stride = matrix.stride(0) if tokens > 1 else width
    if max(matrix.shape) >= MOST_ROWS:
        return f"{name} is {list(matrix.shape)}, not less than {MOST_ROWS} rows and columns"
    if matrix.storage_offset() % vector:
        return f"{name} does not begin at a multiple of {VECTOR} bytes"
    if (width > 1 and matrix.stride(1) != 1) or stride % vector or width % vector:
        return f"{name} has rows of {width} elements every {stride}, not multiples of {vector}"
    return None


def _bad_total(name: str, total: Tensor, dtype: torch.dtype) -> str | None:
    if total.dtype != torch.float32 or not total.is_contiguous():
        return f"{name} is not contiguous float32"
    if total.ndim == 3 and total.shape[1] % (VECTOR // dtype.itemsize):
        return f"layers have {total.shape[1]} outputs, not a multiple of {VECTOR // dtype.itemsize}"
    return None


LIBRARY = Library("eri", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(
    "lora_down(Tensor(a!) rows, Tensor down, int groups, float scale) -> Tensor", tags=TAGS
)
LIBRARY.define(
    "lora_gradient(Tensor dy, Tensor x, Tensor p, Tensor h, Tensor(a!) d_down, Tensor(b!) d_up)"
    " -> ()",
    tags=TAGS,
)
LIBRARY.define(
    "lora_gradients(Tensor[] dy, Tensor[] x, Tensor[] p, Tensor[] h, Tensor(a!)[] d_down,"
    " Tensor(b!)[] d_up) -> ()",
    tags=TAGS,
)
torch.library.impl(LIBRARY, "lora_down", "CPU")(lora_down_reference)
torch.library.impl(LIBRARY, "lora_gradient", "CPU")(lora_gradient_reference)


@torch.library.impl(LIBRARY, "lora_gradients", "CPU")
def _lora_gradients_on_cpu(*lists: list[Tensor]) -> None:
    for one in zip(*lists, strict=True):
        lora_gradient_reference(*one)


@torch.library.register_fake("eri::lora_gradients", lib=LIBRARY)
def _lora_gradients_fake(*lists: list[Tensor]) -> None:
    return None


@torch.library.register_fake("eri::lora_down", lib=LIBRARY)
def _lora_down_fake(rows: Tensor, down: Tensor, groups: int, scale: float) -> Tensor:
    return rows.new_empty((rows.shape[0], down.shape[0]))


@torch.library.register_fake("eri::lora_gradient", lib=LIBRARY)
def _lora_gradient_fake(  # noqa: PLR0917 - the signature of the op
    dy: Tensor, x: Tensor, p: Tensor, h: Tensor, d_down: Tensor, d_up: Tensor
) -> None:
    return None


def lora_down(rows: Tensor, down: Tensor, groups: int, scale: float) -> Tensor:
    """Multiply rows with narrow matrices and write the products behind them, if there is room.

    Args:
        rows: `[T, groups · C + R]`, the last R of which are written, or `[T, groups · C]`; they may
            lie further apart.
        down: `[R, C]`, R / groups rows for each group of C columns; likewise.
        groups: of columns, each with a matrix of its own.
        scale: of the products.

    Returns:
        The products, `[T, R]`.

    Raises:
        ConfigError: the backend is `cuda` and the kernel cannot be used.
    """
    ranks = len(down) // groups
    if use_kernel("lora_down", rows.device, lambda: unsupported(ranks, {}, rows=rows, down=down)):
        return torch.ops.eri.lora_down(rows, down, groups, scale)
    return lora_down_reference(rows, down, groups, scale)


def lora_gradient(  # noqa: PLR0917 - the signature of the op
    dy: Tensor, x: Tensor, p: Tensor, h: Tensor, d_down: Tensor, d_up: Tensor
) -> None:
    """Add the gradients of A and B of n layers on the same input; all rows may lie further apart.

    Args:
        dy: of what the layers gave, side by side, `[T, n · N]`; N may be 0.
        x: their input, `[T, K]`; K may be 0.
        p: s dy times B, `[T, n · rp]`: of each layer r columns and padding.
        h: s x times A, likewise.
        d_down: of A, float32 `[n · r, K]`.
        d_up: of B, float32 `[n, N, r]`.

    Raises:
        ConfigError: the backend is `cuda` and the kernel cannot be used.
    """
    one = Gradient(dy, x, p, h, d_down, d_up)
    if use_kernel("lora_gradient", dy.device, lambda: _unsupported_gradient(one)):
        torch.ops.eri.lora_gradient(*one)
    else:
        lora_gradient_reference(*one)


def lora_gradients(pieces: Sequence[Gradient]) -> None:
    """What `lora_gradient` does for each, none of which reads or writes what another writes.

    A launch takes up to four, so that they fill a card together; large ones do that alone.
    """
    while pieces:
        some, pieces = pieces[:MOST_GRADIENTS], pieces[MOST_GRADIENTS:]
        if len(some) > 1 and kernels_ready(some[0].dy.device) and _alike(some):
            torch.ops.eri.lora_gradients(*map(list, zip(*some, strict=True)))
        else:
            for one in some:
                lora_gradient(*one)


def _alike(pieces: Sequence[Gradient]) -> bool:
    """Whether to take one launch: none is large, all are of a type, and the kernel takes each."""
    numbers = max(one.dy.numel() + one.x.numel() for one in pieces)
    few = numbers <= MOST_TOGETHER and len({one.dy.dtype for one in pieces}) == 1
    return few and all(_unsupported_gradient(one) is None for one in pieces)


def _unsupported_gradient(one: Gradient) -> str | None:
    ranks, totals = one.p.shape[1] // len(one.d_up), {"d_down": one.d_down, "d_up": one.d_up}
    return unsupported(ranks, totals, dy=one.dy, x=one.x, p=one.p, h=one.h)

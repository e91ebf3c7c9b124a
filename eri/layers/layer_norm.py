r"""LayerNorm with a frozen affine map, forward and backward, keeping two numbers of each row.

$$n = z \odot w + b,\quad z = (x - \mu)\,\rho,\quad \rho = (\sigma^2 + \epsilon)^{-1/2}$$

over the last dimension, and with $g = w \odot dn$

$$dx = \rho\,(g - \overline{g} - z\,\overline{g \odot z})\ (+\ \text{residual})$$

A row is read once: 4 bytes an element in 16 bits; backward dn, x and a residual that is added are
read, dx written and n once more, which the gradients of the product that follows need, 10 bytes.
Where x is itself a sum, one pass adds and normalises: two rows are read and the rounded sum and n
written, 8 bytes instead of 10. Statistics are float32. Behind the rows of n and dx a tail can be
left, see `eri/layers/vectors.py`.

Source: Ba et al., "Layer Normalization", arXiv 1607.06450.

Limits of the kernels: sm_80 or newer; float32, float16 or bfloat16, the affine map too; rows of a
multiple of 8 elements, at most 2560, or of 4 and at most 1280 in float32; tails of such multiples.
Inputs whose rows are not at one stride of a multiple of 16 bytes are copied.

Measured with `pytest -s -m gpu tests/layers/test_layer_norm.py -k bandwidth`.
"""

import torch
from torch import Tensor, nn
from torch.library import Library

from eri.layers.backend import use_kernel
from eri.layers.vectors import (
    VECTOR,
    aligned_rows,
    type_name,
    unsupported_tail,
    unsupported_type,
    with_tail,
)

__all__ = [
    "add_layer_norm",
    "add_layer_norm_reference",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_backward_reference",
    "layer_norm_reference",
    "unsupported",
]

MOST_VECTORS = 320  # of a row
MOST_ROWS = 2**31


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """What `layer_norm` is, in PyTorch's own operations."""
    n, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
    return n, torch.stack([mean.flatten(), rstd.flatten()], dim=1)


def add_layer_norm_reference(
    x: Tensor, added: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What `add_layer_norm` is, in PyTorch's own operations."""
    total = x + added
    return total, *layer_norm_reference(total, weight, bias, eps)


def layer_norm_backward_reference(
    dn: Tensor, x: Tensor, mean_rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> Tensor:
    """What `layer_norm_backward` is, in PyTorch's own operations."""
    mean, rstd = (part.view(*x.shape[:-1], 1) for part in mean_rstd.t().contiguous())
    dx = torch.ops.aten.native_layer_norm_backward(
        dn, x, x.shape[-1:], mean, rstd, weight, None, [True, False, False]
    )[0]
    return dx if residual is None else dx.add_(residual)


def _again(x: Tensor, mean_rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The norm of x from what was kept of it."""
    mean, rstd = (part.view(*x.shape[:-1], 1) for part in mean_rstd.t())
    return torch.addcmul(bias, (x - mean) * rstd, weight).to(x.dtype)


def unsupported(x: Tensor, weight: Tensor, tail: int = 0) -> str | None:
    """Why the kernels cannot take x and its weight or leave such a tail, in words; None where they
    can.
    """
    if (reason := unsupported_type("x", x)) is not None:
        return reason
    if weight.dtype != x.dtype:
        return f"x is {type_name(x.dtype)}, and its weight {type_name(weight.dtype)}"
    vector = VECTOR // x.element_size()
    if x.shape[-1] % vector or x.shape[-1] > vector * MOST_VECTORS:
        most = vector * MOST_VECTORS
        return f"x has rows of {x.shape[-1]} elements, not a multiple of {vector} up to {most}"
    if not 0 < x.numel() // x.shape[-1] < MOST_ROWS:
        return f"x has {x.numel() // x.shape[-1]} rows, not 1 to {MOST_ROWS - 1}"
    return unsupported_tail(tail, x)


LIBRARY = Library("eri", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, int tail) -> (Tensor, Tensor)",
    tags=TAGS,
)
LIBRARY.define(
    "add_layer_norm(Tensor x, Tensor added, Tensor weight, Tensor bias, float eps, int tail)"
    " -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)
LIBRARY.define(
    "layer_norm_backward(Tensor dn, Tensor x, Tensor mean_rstd, Tensor weight, Tensor bias,"
    " Tensor? residual, int tail) -> (Tensor, Tensor)",
    tags=TAGS,
)


@torch.library.impl(LIBRARY, "layer_norm", "CPU")
def _layer_norm_on_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, tail: int
) -> tuple[Tensor, Tensor]:
    n, mean_rstd = layer_norm_reference(x, weight, bias, eps)
    return with_tail(n, tail), mean_rstd.float()


@torch.library.impl(LIBRARY, "add_layer_norm", "CPU")
def _add_layer_norm_on_cpu(  # noqa: PLR0917 - the signature of the op
    x: Tensor, added: Tensor, weight: Tensor, bias: Tensor, eps: float, tail: int
) -> tuple[Tensor, Tensor, Tensor]:
    total, n, mean_rstd = add_layer_norm_reference(x, added.view(x.shape), weight, bias, eps)
    return with_tail(total, 0), with_tail(n, tail), mean_rstd.float()


@torch.library.impl(LIBRARY, "layer_norm_backward", "CPU")
def _layer_norm_backward_on_cpu(  # noqa: PLR0917 - the signature of the op
    dn: Tensor,
    x: Tensor,
    mean_rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    tail: int,
) -> tuple[Tensor, Tensor]:
    kept = mean_rstd.to(x.dtype)
    residual = None if residual is None else residual.view(x.shape)
    dx = layer_norm_backward_reference(dn.view(x.shape), x, kept, weight, residual)
    return with_tail(dx, tail), with_tail(_again(x, kept, weight, bias), 0)


@torch.library.register_fake("eri::layer_norm", lib=LIBRARY)
def _layer_norm_fake(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, tail: int
) -> tuple[Tensor, Tensor]:
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    return x.new_empty((rows, width + tail)), x.new_empty((rows, 2), dtype=torch.float32)


@torch.library.register_fake("eri::add_layer_norm", lib=LIBRARY)
def _add_layer_norm_fake(  # noqa: PLR0917 - the signature of the op
    x: Tensor, added: Tensor, weight: Tensor, bias: Tensor, eps: float, tail: int
) -> tuple[Tensor, Tensor, Tensor]:
    n, mean_rstd = _layer_norm_fake(x, weight, bias, eps, tail)
    return x.new_empty((n.shape[0], x.shape[-1])), n, mean_rstd


@torch.library.register_fake("eri::layer_norm_backward", lib=LIBRARY)
def _layer_norm_backward_fake(  # noqa: PLR0917 - the signature of the op
    dn: Tensor,
    x: Tensor,
    mean_rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    tail: int,
) -> tuple[Tensor, Tensor]:
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    return x.new_empty((rows, width + tail)), x.new_empty((rows, width))


def layer_norm(x: Tensor, norm: nn.LayerNorm, tail: int = 0) -> tuple[Tensor, Tensor]:
    """`norm(x)` of rows `[..., D]`, and their means and 1 / deviations, `[rows, 2]`; both without
    a gradient of their own. With a tail the first is `[rows, D + tail]`.

    Raises:
        ConfigError: the backend is `cuda` and the kernel cannot be used.
    """
    weight, bias = norm.weight, norm.bias
    if use_kernel("layer_norm", x.device, lambda: unsupported(x, weight, tail)):
        n, mean_rstd = torch.ops.eri.layer_norm(aligned_rows(x), weight, bias, norm.eps, tail)
    else:
        n, mean_rstd = layer_norm_reference(x, weight, bias, norm.eps)
        n = with_tail(n, tail)
    return n if tail else n.view(x.shape), mean_rstd


def add_layer_norm(
    x: Tensor, added: Tensor, norm: nn.LayerNorm, tail: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """`x + added`, rounded, and what `layer_norm` gives for it.

    Args:
        x: rows `[..., D]`, as is the sum.
        added: with the rows of x.
        norm: of the sum.
        tail: behind the rows of the norm.

    Raises:
        ConfigError: the backend is `cuda` and the kernel cannot be used.
    """
    weight, bias, added = norm.weight, norm.bias, added.view(x.shape)
    if use_kernel("add_layer_norm", x.device, lambda: unsupported(x, weight, tail)):
        rows = aligned_rows(x), aligned_rows(added)
        total, n, mean_rstd = torch.ops.eri.add_layer_norm(*rows, weight, bias, norm.eps, tail)
    else:
        total, n, mean_rstd = add_layer_norm_reference(x, added, weight, bias, norm.eps)
        n = with_tail(n, tail)
    return total.view(x.shape), n if tail else n.view(x.shape), mean_rstd


def layer_norm_backward(  # noqa: PLR0917 - the signature of the op
    dn: Tensor,
    x: Tensor,
    mean_rstd: Tensor,
    norm: nn.LayerNorm,
    residual: Tensor | None = None,
    tail: int = 0,
) -> tuple[Tensor, Tensor]:
    """The gradient of x `[..., D]`, with a tail `[rows, D + tail]`; and the norm once more.

    The norm is `[rows, D]`: the product that follows it needs it for its gradients.

    Args:
        dn: of what `layer_norm` gave, with the rows of x.
        x: its input, or the sum that `add_layer_norm` gave.
        mean_rstd: what it kept of x.
        norm: the same.
        residual: is added, with the rows of x.
        tail: behind the rows of the result.

    Raises:
        ConfigError: the backend is `cuda` and the kernel cannot be used.
    """
    dn = dn.view(x.shape)
    added = None if residual is None else residual.view(x.shape)
    if use_kernel("layer_norm", x.device, lambda: unsupported(x, norm.weight, tail)):
        added = None if added is None else aligned_rows(added)
        rows = aligned_rows(dn), aligned_rows(x), mean_rstd
        dx, n = torch.ops.eri.layer_norm_backward(*rows, norm.weight, norm.bias, added, tail)
    else:
        dx = layer_norm_backward_reference(dn, x, mean_rstd, norm.weight, added)
        dx = with_tail(dx, tail)
        n = with_tail(layer_norm_reference(x, norm.weight, norm.bias, norm.eps)[0], 0)
    return dx if tail else dx.view(x.shape), n

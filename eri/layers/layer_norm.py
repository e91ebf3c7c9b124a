r"""LayerNorm with a frozen affine map, forward and backward, keeping two numbers of each row.

$$n = z \odot w + b,\quad z = (x - \mu)\,\rho,\quad \rho = (\sigma^2 + \epsilon)^{-1/2}$$

over the last dimension, and with $g = w \odot dn$

$$dx = \rho\,(g - \overline{g} - z\,\overline{g \odot z})\ (+\ \text{residual})$$

A row is read once: 4 bytes an element in 16 bits; backward dn, x and a residual that is added are
read and dx written, 8 bytes. Statistics are float32.

Source: Ba et al., "Layer Normalization", arXiv 1607.06450.

Limits of the kernels: sm_80 or newer; float32, float16 or bfloat16, the affine map too; rows of a
multiple of 8 elements, at most 2560, or of 4 and at most 1280 in float32. Inputs that are not
contiguous are copied.

Measured with `pytest -s -m gpu tests/layers/test_layer_norm.py -k bandwidth`.
"""

import torch
from torch import Tensor, nn
from torch.library import Library

from eri.layers.backend import use_kernel
from eri.layers.vectors import VECTOR, aligned_rows, type_name, unsupported_type

__all__ = [
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


def layer_norm_backward_reference(
    dn: Tensor, x: Tensor, mean_rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> Tensor:
    """What `layer_norm_backward` is, in PyTorch's own operations."""
    mean, rstd = (part.view(*x.shape[:-1], 1) for part in mean_rstd.t().contiguous())
    dx = torch.ops.aten.native_layer_norm_backward(
        dn, x, x.shape[-1:], mean, rstd, weight, None, [True, False, False]
    )[0]
    return dx if residual is None else dx.add_(residual)


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    """Why the kernels cannot take x and its weight, in words; None where they can."""
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
    return None


LIBRARY = Library("eri", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)", tags=TAGS
)
LIBRARY.define(
    "layer_norm_backward(Tensor dn, Tensor x, Tensor mean_rstd, Tensor weight, Tensor? residual)"
    " -> Tensor",
    tags=TAGS,
)


@torch.library.impl(LIBRARY, "layer_norm", "CPU")
def _layer_norm_on_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    n, mean_rstd = layer_norm_reference(x, weight, bias, eps)
    return n, mean_rstd.float()


@torch.library.impl(LIBRARY, "layer_norm_backward", "CPU")
def _layer_norm_backward_on_cpu(
    dn: Tensor, x: Tensor, mean_rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> Tensor:
    kept = mean_rstd.to(x.dtype)
    return layer_norm_backward_reference(dn, x, kept, weight, residual)


@torch.library.register_fake("eri::layer_norm", lib=LIBRARY)
def _layer_norm_fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    return torch.empty_like(x), x.new_empty((rows, 2), dtype=torch.float32)


@torch.library.register_fake("eri::layer_norm_backward", lib=LIBRARY)
def _layer_norm_backward_fake(
    dn: Tensor, x: Tensor, mean_rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> Tensor:
    return torch.empty_like(x)


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """`norm(x)` of rows `[..., D]`, and their means and 1 / deviations, `[rows, 2]`; both without
    a gradient of their own.

    Raises:
        ConfigError: the backend is `cuda` and the kernel cannot be used.
    """
    weight, bias = norm.weight, norm.bias
    if use_kernel("layer_norm", x.device, lambda: unsupported(x, weight)):
        return torch.ops.eri.layer_norm(aligned_rows(x), weight, bias, norm.eps)
    return layer_norm_reference(x, weight, bias, norm.eps)


def layer_norm_backward(
    dn: Tensor, x: Tensor, mean_rstd: Tensor, norm: nn.LayerNorm, residual: Tensor | None = None
) -> Tensor:
    """The gradient of x `[..., D]`.

    Args:
        dn: of what `layer_norm` gave, with the rows of x.
        x: its input.
        mean_rstd: what it kept of x.
        norm: the same.
        residual: is added, like x.

    Raises:
        ConfigError: the backend is `cuda` and the kernel cannot be used.
    """
    dn = dn.view(x.shape)
    if use_kernel("layer_norm", x.device, lambda: unsupported(x, norm.weight)):
        added = None if residual is None else aligned_rows(residual)
        rows = aligned_rows(dn), aligned_rows(x), mean_rstd
        return torch.ops.eri.layer_norm_backward(*rows, norm.weight, added)
    return layer_norm_backward_reference(dn, x, mean_rstd, norm.weight, residual)

r"""GroupNorm and the SiLU after it as one operation that keeps its input alone.

$$y = \gamma\,(x - \mu)\,\rho + \beta,\quad a = y\,\sigma(y)$$

with mean μ and ρ = 1 / √(var + eps) of each group of channels of each sample, in float32. For the
backward pass x, μ and ρ are kept; y is computed again:

$$g = \gamma\,da\,\sigma(y)\,(1 + y\,(1 - \sigma(y))),\quad
dx = \rho\,(g - \mathrm{mean}(g) - \hat x\,\mathrm{mean}(g\,\hat x))$$

with $\hat x = (x - \mu)\,\rho$ and means over the group. γ and β are frozen: they get no gradient.

Numbers for each channel of each sample may be added to x before, such as the bias of the
convolution that made x and a time embedding. They are frozen, too. A map may be added to dx: the
gradient that reaches x on another way.

Fused are, forward, the statistics (one kernel) and everything after them (another): x is read
twice, the second time from the L2 cache as far as it fits, and a written once; backward da and x
are read twice and dx written. What is added to x takes no pass over a map, for it moves means
alone; what is added to dx is read once. Variances are sums of squares of deviations, never
differences of large numbers, so a mean of 100 standard deviations costs 16-bit results nothing; all
sums have one order, so equal inputs give equal bits.

Source: Wu, He, "Group Normalization", arXiv 1803.08494; Elfwing et al., arXiv 1702.03118.

Limits of the kernels: sm_80 or newer; float32, float16 or bfloat16, weights of the same type; maps
that lie pixel by pixel (`channels_last`; gaps and other gradients are copied away); channels a
multiple of 8, or of 4 in float32; groups of at most 2560 channels, or 1280 in float32, fewer where
the width is odd; at most 65535 samples, each of less than 2³¹ elements.

Measured with `pytest -s -m gpu tests/layers/test_group_norm_silu.py -k bandwidth`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.library import Library

from eri.layers.backend import use_kernel
from eri.layers.vectors import VECTOR, aligned, aligned_rows, type_name, unsupported_type

__all__ = [
    "group_norm_beside",
    "group_norm_silu",
    "group_norm_silu_backward",
    "group_norm_silu_backward_reference",
    "group_norm_silu_forward",
    "group_norm_silu_reference",
    "unsupported",
]

MOST_VECTORS = 320  # of a group, and of the other limits, as csrc/group_norm_silu.h has them
MOST_SAMPLES = 65535
MOST_ELEMENTS = 2**31


def group_norm_silu_reference(  # noqa: PLR0917 - the signature of the op
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `group_norm_silu` is, in PyTorch's own operations; with mean and ρ `[B, groups, 2]`."""
    y, mean, rstd = _normalise(_sum(x, added), weight, bias, groups, eps)
    y = F.silu(y, inplace=True) if silu else y
    mean_rstd = torch.stack((mean, rstd), dim=-1).to(_statistics_dtype(x))
    return y.contiguous(memory_format=_layout(x)), mean_rstd


def group_norm_silu_backward_reference(  # noqa: PLR0917 - the signature of the op
    dy: Tensor,
    x: Tensor,
    mean_rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    silu: bool,
    added: Tensor | None = None,
    plus: Tensor | None = None,
) -> Tensor:
    """The gradient of x, and what is added to it, in PyTorch's own operations."""
    n, c, h, w = x.shape
    dense, dy = _sum(x, added), dy.contiguous()
    if silu:
        y = _normalise_with(dense, mean_rstd, weight, bias)
        torch.ops.aten.silu_backward.grad_input(dy.to(y.dtype), y, grad_input=y)
        dy = y.to(x.dtype)
        del y
    dtype = x.dtype if weight is None else weight.dtype
    # PyTorch reads them as if they were contiguous, and does not check
    mean, rstd = (row.to(dtype).contiguous() for row in mean_rstd.unbind(-1))
    dx = torch.ops.aten.native_group_norm_backward(
        dy, dense, mean, rstd, weight, n, c, h * w, groups, [True, False, False]
    )[0]
    dx = dx.contiguous(memory_format=_layout(x))
    return dx if plus is None else dx.add_(plus)


def _sum(x: Tensor, added: Tensor | None) -> Tensor:
    """A map and what is added to each channel of a sample, laid out channel by channel."""
    if added is None:
        return x.contiguous()
    row = added[:, :, None, None]
    return (x + row).to(x.dtype) if x.is_contiguous() else x.contiguous().add_(row)


def _normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised map, laid out channel by channel as x is, and mean and ρ `[B, groups]`."""
    n, c, h, w = x.shape
    return torch.native_group_norm(x, weight, bias, n, c, h * w, groups, eps)


def _normalise_with(
    x: Tensor, mean_rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The normalised map from known statistics and in their type."""
    groups = x.to(mean_rstd.dtype).unflatten(1, (mean_rstd.shape[1], -1))
    mean, rstd = (row[:, :, None, None, None] for row in mean_rstd.unbind(-1))
    y = (groups - mean).mul_(rstd).flatten(1, 2)
    y = y if weight is None else y.mul_(weight[:, None, None])
    return y if bias is None else y.add_(bias[:, None, None])


def _layout(x: Tensor) -> torch.memory_format:
    """Pixel by pixel (`channels_last`) where x lies like that, else channel by channel."""
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def unsupported(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    added: Tensor | None = None,
) -> str | None:
    """Why the kernels cannot take these arguments, in words; None where they can."""
    if x.dim() != 4 or not x.numel():
        return f"x is {list(x.shape)}, not a map [B, C, H, W] with elements"
    if (reason := unsupported_type("x", x)) is not None:
        return reason
    for name, row in {"weight": weight, "bias": bias}.items():
        if row is None:
            return f"there is no {name}"
        if row.dtype != x.dtype:
            return f"{name} is {type_name(row.dtype)}, x is {type_name(x.dtype)}"
    if added is not None and added.dtype != x.dtype:
        return f"what is added is {type_name(added.dtype)}, x is {type_name(x.dtype)}"
    return _unsupported_layout(x) or _unsupported_size(x, groups)


def _unsupported_layout(x: Tensor) -> str | None:
    if x.stride(1) != 1:
        return "x does not lie pixel by pixel (channels_last)"
    return None


def _unsupported_size(x: Tensor, groups: int) -> str | None:
    samples, channels, height, width = x.shape
    vector = VECTOR // x.element_size()
    if channels % vector or channels % groups:
        return f"x has {channels} channels, not a multiple of {vector} and of {groups} groups"
    if math.lcm(channels // groups, vector) > MOST_VECTORS * vector:
        return f"groups of {channels // groups} channels are too wide"
    most = max(channels * height * width, samples * groups)  # counted in 32 bits
    if samples > MOST_SAMPLES or most >= MOST_ELEMENTS:
        return f"x is {list(x.shape)}, too large"
    return None


LIBRARY = Library("eri", "FRAGMENT")
LIBRARY.define(
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu, "
    "Tensor? added=None) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "group_norm_silu_backward(Tensor dy, Tensor x, Tensor mean_rstd, Tensor weight, Tensor bias, "
    "int groups, bool silu, Tensor? added=None, Tensor? plus=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl(LIBRARY, "group_norm_silu", "CPU")(group_norm_silu_reference)
torch.library.impl(LIBRARY, "group_norm_silu_backward", "CPU")(group_norm_silu_backward_reference)


@torch.library.register_fake("eri::group_norm_silu", lib=LIBRARY)
def _fake(  # noqa: PLR0917 - the signature of the op
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    mean_rstd = x.new_empty((x.shape[0], groups, 2), dtype=_statistics_dtype(x))
    return torch.empty_like(x, memory_format=_layout(x)), mean_rstd


@torch.library.register_fake("eri::group_norm_silu_backward", lib=LIBRARY)
def _backward_fake(dy: Tensor, x: Tensor, *others: object) -> Tensor:
    return torch.empty_like(x, memory_format=_layout(x))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.groups, _, ctx.silu, added = inputs
    if added is not None and added.requires_grad:
        raise ValueError("group_norm_silu: what is added is frozen, and this requires a gradient")
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], weight, bias, added)


@once_differentiable
def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    dx = None
    if grads[0] is not None:
        x, mean_rstd, weight, bias, added = ctx.saved_tensors
        settings = (weight, bias, ctx.groups, ctx.silu)
        dx = _gradient(grads[0], x, mean_rstd, *settings, added, None)
    return dx, None, None, None, None, None, None


torch.library.register_autograd("eri::group_norm_silu", _backward, setup_context=_keep, lib=LIBRARY)


class _Reference(torch.autograd.Function):
    """The reference with what the op keeps and gives back, where the op has a kernel alone."""

    forward = staticmethod(group_norm_silu_reference)
    setup_context = staticmethod(_keep)
    backward = staticmethod(_backward)  # pyright: ignore[reportAssignmentType]


def group_norm_silu(x: Tensor, norm: nn.GroupNorm, *, silu: bool = True) -> Tensor:
    """Normalise a map `[B, C, H, W]` by groups, then apply SiLU.

    Args:
        x: the map, in any memory format, which the result has as well.
        norm: whose groups, eps and frozen weights are used.
        silu: whether SiLU follows.

    Raises:
        ConfigError: the backend is `cuda` and the kernel cannot be used.
    """
    arguments = (norm.weight, norm.bias, norm.num_groups)
    if use_kernel("group_norm_silu", x.device, lambda: unsupported(x, *arguments)):
        return torch.ops.eri.group_norm_silu(_dense(x), *arguments, norm.eps, silu)[0]
    return _Reference.apply(x, *arguments, norm.eps, silu, None)[0]


def group_norm_beside(x: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """`norm(x)`, and x for what goes around it: both gradients of x are added in one pass.

    Args:
        x: the map `[B, C, H, W]`.
        norm: frozen.
    """
    return _Beside.apply(x, norm)


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        n, mean_rstd = group_norm_silu_forward(x, norm, silu=False)
        ctx.norm = norm
        ctx.save_for_backward(x, mean_rstd)
        return n, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, mean_rstd = ctx.saved_tensors
        dy, plus = grads
        return group_norm_silu_backward(dy, x, mean_rstd, ctx.norm, plus=plus, silu=False), None


def group_norm_silu_forward(
    x: Tensor, norm: nn.GroupNorm, added: Tensor | None = None, *, silu: bool = True
) -> tuple[Tensor, Tensor]:
    """What `group_norm_silu` gives, without a graph, and what its backward pass needs beside x.

    Args:
        x: the map `[B, C, H, W]`.
        norm: whose groups, eps and frozen weights are used.
        added: to each pixel of x before, `[B, C]`; rows may be one and the same.
        silu: whether SiLU follows.

    Returns:
        The map, laid out as x is, and mean and ρ `[B, groups, 2]` of what was normalised.

    Raises:
        ConfigError: the backend is `cuda` and the kernel cannot be used.
    """
    arguments = (norm.weight, norm.bias, norm.num_groups)
    if use_kernel("group_norm_silu", x.device, lambda: unsupported(x, *arguments, added)):
        rows = None if added is None else aligned_rows(added)
        return torch.ops.eri.group_norm_silu(_dense(x), *arguments, norm.eps, silu, rows)
    return group_norm_silu_reference(x, *arguments, norm.eps, silu, added)


def group_norm_silu_backward(  # noqa: PLR0917 - the signature of the op
    dy: Tensor,
    x: Tensor,
    mean_rstd: Tensor,
    norm: nn.GroupNorm,
    added: Tensor | None = None,
    plus: Tensor | None = None,
    *,
    silu: bool = True,
) -> Tensor:
    """The gradient of x, laid out as x is.

    Args:
        dy: of what `group_norm_silu_forward` gave.
        x: what went into it.
        mean_rstd: what it gave beside.
        norm: the same.
        added: the same.
        plus: a map that is added to the gradient.
        silu: the same.

    Raises:
        ConfigError: the backend is `cuda` and the kernel cannot be used.
    """
    settings = (norm.weight, norm.bias, norm.num_groups, silu)
    return _gradient(dy, x, mean_rstd, *settings, added, plus)


def _gradient(  # noqa: PLR0917 - the signature of the op
    dy: Tensor,
    x: Tensor,
    mean_rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    silu: bool,
    added: Tensor | None,
    plus: Tensor | None,
) -> Tensor:
    """The gradient of x by the kernel, where it can, or by the reference."""
    others = (mean_rstd, weight, bias, groups, silu)
    if use_kernel("group_norm_silu", x.device, lambda: unsupported(x, weight, bias, groups, added)):
        rows = None if added is None else aligned_rows(added)
        plus = None if plus is None else _dense(plus)
        maps = _dense(dy), _dense(x)
        return torch.ops.eri.group_norm_silu_backward(*maps, *others, rows, plus)
    return group_norm_silu_backward_reference(dy, x, *others, added, plus)


def _dense(x: Tensor) -> Tensor:
    """A map as the kernels read it; a copy only where it lies otherwise."""
    return aligned(x.contiguous(memory_format=torch.channels_last))

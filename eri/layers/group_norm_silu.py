r"""GroupNorm and the SiLU after it as one operation that keeps its input alone.

$$y = \gamma\,(x - \mu)\,\rho + \beta,\quad a = y\,\sigma(y)$$

with mean μ and ρ = 1 / √(var + eps) of each group of channels of each sample, in float32. For the
backward pass x, μ and ρ are kept; y is computed again. γ and β are frozen: they get no gradient.

Source: Wu, He, "Group Normalization", arXiv 1803.08494; Elfwing et al., arXiv 1702.03118.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["group_norm_silu"]


def group_norm_silu(x: Tensor, norm: nn.GroupNorm, *, silu: bool = True) -> Tensor:
    """Normalise a map `[B, C, H, W]` by groups, then apply SiLU.

    Args:
        x: the map, in any memory format, which the result has as well.
        norm: whose groups, eps and frozen weights are used.
        silu: whether SiLU follows.
    """
    return _GroupNormSiLU.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> Tensor:
        y, mean, rstd = _normalise(x, weight, bias, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        ctx.eps = eps
        y = F.silu(y, inplace=True) if silu else y
        return y.contiguous(memory_format=_layout(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dy = grads[0].contiguous()
        if ctx.silu:
            y = _normalise(x, weight, bias, ctx.groups, ctx.eps)[0]
            dy = torch.ops.aten.silu_backward(dy, y)
        n, c, h, w = x.shape
        dx = torch.ops.aten.native_group_norm_backward(
            dy, x.contiguous(), mean, rstd, weight, n, c, h * w, ctx.groups, [True, False, False]
        )[0]
        return dx.contiguous(memory_format=_layout(x)), None, None, None, None, None


def _normalise(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised map, laid out channel by channel, and mean and ρ `[B, groups]`."""
    n, c, h, w = x.shape
    return torch.native_group_norm(x.contiguous(), weight, bias, n, c, h * w, groups, eps)


def _layout(x: Tensor) -> torch.memory_format:
    """Pixel by pixel (`channels_last`) where x lies like that, else channel by channel."""
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format

r"""A residual block as one function, which keeps little and passes over no map to add to it.

    h = conv₁(silu(norm₁(x)))
    y = conv₂(silu(norm₂(h + c))) + b₂ + shortcut(x),  c = W silu(t) + b₁

Convolutions give maps without their biases. What is c for a whole channel of a sample, b₁ and the
time embedding, the second norm adds; b₂ comes with the residual. On the way back the first norm
adds the gradient that goes around it.

Kept for the backward pass are x and h, c, and two numbers for each group of both norms. What goes
into a convolution is not: its weight is frozen.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from eri.layers.add_maps import add_maps
from eri.layers.frozen_conv import conv_input_gradient
from eri.layers.group_norm_silu import group_norm_silu_backward, group_norm_silu_forward

__all__ = ["ResNetParts", "resnet_block"]


class ResNetParts(NamedTuple):
    """A residual block's frozen layers."""

    norm1: nn.GroupNorm
    conv1: nn.Conv2d
    time_proj: nn.Linear | None
    norm2: nn.GroupNorm
    conv2: nn.Conv2d
    shortcut: nn.Conv2d | None  # 1×1; None: x itself


def resnet_block(x: Tensor, temb: Tensor | None, parts: ResNetParts) -> Tensor:
    """Run a residual block whose weights are frozen.

    Args:
        x: `[B, C, H, W]`; copied where it does not lie pixel by pixel.
        temb: the time embedding `[B, E]`, which nothing trains; read where there is a `time_proj`.
        parts: of the block.

    Raises:
        ValueError: the time embedding requires a gradient.
    """
    if temb is not None and temb.requires_grad and torch.is_grad_enabled():
        raise ValueError("resnet_block: temb requires a gradient, and a lean block has none for it")
    return _ResNet.apply(x, temb, parts)


class _ResNet(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, temb: Tensor | None, parts: ResNetParts) -> Tensor:
        kept = x.contiguous(memory_format=torch.channels_last)
        x = _map(_pixels(kept), kept)  # whose strides say it, even those of a batch of one
        added = _added(x, temb, parts)
        n, moments1 = group_norm_silu_forward(x, parts.norm1)
        h = _without_bias(n, parts.conv1)
        n, moments2 = group_norm_silu_forward(h, parts.norm2, added)
        y = _without_bias(n, parts.conv2)
        del n
        ctx.parts = parts
        ctx.save_for_backward(kept, h, added, moments1, moments2)
        return add_maps(y, _around(x, parts.shortcut), _bias(parts.conv2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        kept, h, added, moments1, moments2 = ctx.saved_tensors
        x, parts = _map(_pixels(kept), kept), ctx.parts
        g = grads[0].contiguous(memory_format=torch.channels_last)
        d = conv_input_gradient(g, h, parts.conv2)
        d = group_norm_silu_backward(d, h, moments2, parts.norm2, added)
        d = conv_input_gradient(d, x, parts.conv1)
        plus = g if parts.shortcut is None else None
        d = group_norm_silu_backward(d, x, moments1, parts.norm1, plus=plus)
        if parts.shortcut is not None:
            _pixels(d).addmm_(_pixels(g), _matrix(parts.shortcut))
        return d, None, None


def _added(x: Tensor, temb: Tensor | None, parts: ResNetParts) -> Tensor:
    """What the second norm adds to the first convolution's map, `[B, N]`."""
    bias = _bias(parts.conv1)
    if parts.time_proj is None or temb is None:
        return bias.expand(len(x), -1)
    bias = bias + _bias(parts.time_proj)
    return F.linear(F.silu(temb), parts.time_proj.weight, bias).expand(len(x), -1)


def _bias(layer: nn.Conv2d | nn.Linear) -> Tensor:
    if layer.bias is None:
        raise ValueError(f"resnet_block: {layer} has no bias")
    return layer.bias


def _without_bias(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return torch.conv2d(x, conv.weight, None, conv.stride, conv.padding)


def _around(x: Tensor, shortcut: nn.Conv2d | None) -> Tensor:
    """What goes around both convolutions: of a 1×1 convolution a product, which adds its bias."""
    if shortcut is None:
        return x
    return _map(F.linear(_pixels(x), _matrix(shortcut), shortcut.bias), x)


def _pixels(x: Tensor) -> Tensor:
    """`[B, C, H, W]` that lies pixel by pixel to `[B·H·W, C]`, a view."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def _map(rows: Tensor, like: Tensor) -> Tensor:
    """`[B·H·W, N]` to `[B, N, H, W]` of the sizes of another, a view."""
    return rows.unflatten(0, (len(like), *like.shape[2:])).permute(0, 3, 1, 2)


def _matrix(conv: nn.Conv2d) -> Tensor:
    """A 1×1 filter as the weight of a linear layer."""
    return conv.weight.flatten(1)

"""A convolution whose weights are frozen, and which therefore keeps nothing for its backward pass.

PyTorch's own keeps its input, which only the gradient of the weight needs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from eri.layers.add_maps import add_maps, unsupported

__all__ = ["conv_input_gradient", "frozen_conv"]


def frozen_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv(x)` for a convolution that does not train and pads with zeros.

    Args:
        x: `[B, Cin, H, W]`.
        conv: without `requires_grad` on its weights.
    """
    return _FrozenConv.apply(
        x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )


class _FrozenConv(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 (autograd's order)
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape = x.shape
        ctx.settings = (stride, padding, dilation, False, (0, 0), groups)
        if bias is None or not x.is_cuda:
            return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
        # cuDNN's convolution has no bias: PyTorch would add it in a pass of half the speed
        y = torch.conv2d(x, weight, None, stride, padding, dilation, groups)
        if unsupported(y, None, bias) is None:
            return add_maps(y, None, bias)
        return y.add_(bias[:, None, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        like = grads[0]
        pixels = weight.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if pixels else torch.contiguous_format
        if like.shape != ctx.shape or not like.is_contiguous(memory_format=layout):
            like = torch.empty(
                ctx.shape, dtype=like.dtype, device=like.device, memory_format=layout
            )
        dx = _input_gradient(grads[0], like, weight, ctx.settings)
        return dx, None, None, None, None, None, None


def conv_input_gradient(dy: Tensor, like: Tensor, conv: nn.Conv2d) -> Tensor:
    """The gradient of a convolution's input.

    Args:
        dy: of its output, `[B, N, H', W']`.
        like: a map that is laid out as the weight is and has the shape of the input; what it holds
            is not read. Laid out otherwise it would be copied.
        conv: pads with zeros.
    """
    settings = (conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups)
    return _input_gradient(dy, like, conv.weight, settings)


def _input_gradient(dy: Tensor, like: Tensor, weight: Tensor, settings: tuple[Any, ...]) -> Tensor:
    # PyTorch asks for the input itself, of which this gradient needs the shape alone
    return torch.ops.aten.convolution_backward(
        dy, like, weight, None, *settings, (True, False, False)
    )[0]

"""A convolution whose weights are frozen, and which therefore keeps nothing for its backward pass.

PyTorch's own keeps its input, which only the gradient of the weight needs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["frozen_conv"]


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
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        # the gradient of x needs the shape of x alone, but would copy it into the weight's layout
        x = grads[0]
        pixels = weight.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if pixels else torch.contiguous_format
        if x.shape != ctx.shape or not x.is_contiguous(memory_format=layout):
            x = torch.empty(ctx.shape, dtype=x.dtype, device=x.device, memory_format=layout)
        dx = torch.ops.aten.convolution_backward(
            grads[0], x, weight, None, *ctx.settings, (True, False, False)
        )[0]
        return dx, None, None, None, None, None, None

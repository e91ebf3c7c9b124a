"""A convolution with a low-rank update."""

from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from eri.layers.conv import Conv2d
from eri.layers.lora import LoRALayer, check_rank, master_dtype
from eri.layers.lora_linear import lora_linear, runs_fused

__all__ = ["LoRAConv2d"]

Pair = tuple[int, int]  # (height, width)


class LoRAConv2d(LoRALayer[nn.Conv2d]):
    """y = base(x) + scale · B(A(dropout(x))) with a frozen base.

    A is a convolution to `rank` channels with the base's kernel, stride and padding, B is 1×1.
    `lora_a.weight` is `[rank, Cin / groups, kh, kw]`, drawn from U(±1/√(Cin / groups · kh · kw)),
    and `lora_b.weight` is `[Cout, rank, 1, 1]`, zero. In a grouped base every group goes through
    the same A and its own rows of B, which is what makes B A a matrix of the base's shape. One of
    1×1 on a `channels_last` map is a linear layer on pixels and runs as `LoRALinear` does. See
    `LoRALayer` for scale, dtypes, `delta`, `merge` and `unmerge`.

    Source: Hu et al., "LoRA", arXiv 2106.09685; the convolution's split is LoCon's.

    Args:
        in_channels: Cin.
        out_channels: Cout.
        kernel_size: one number or (height, width).
        rank: channels between A and B.
        stride: one number or (height, width).
        padding: one number or (height, width).
        groups: groups of the base.
        alpha: numerator of the scale; None is a scale of 1.0.
        dropout: probability that an element of the adapter's input is dropped in training.
        bias: whether the base has a bias.
        dtype: of the base; A and B are float32 at least.

    Raises:
        ValueError: the rank is not a positive integer.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        rank: int,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        groups: int = 1,
        alpha: float | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        base = Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            groups=groups,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self._adapt(base, rank, alpha=alpha, dropout=dropout, generator=None)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Adapt an existing convolution, which becomes `base` itself, unchanged but frozen.

        Args:
            conv: a convolution with zero padding and without dilation.
            rank: channels between A and B.
            alpha: numerator of the scale.
            dropout: probability that an element of the adapter's input is dropped in training.
            generator: a CPU generator to draw A with.

        Raises:
            ValueError: the convolution is dilated or not padded with a number of zeros.
        """
        zero_padded = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        if not zero_padded or conv.dilation != (1, 1):
            raise ValueError(
                f"{cls.__name__}: expected a zero-padded convolution without dilation, found {conv}"
            )
        layer = cls.__new__(cls)
        layer._adapt(conv, rank, alpha=alpha, dropout=dropout, generator=generator)
        return layer

    def _adapt(
        self,
        base: nn.Conv2d,
        rank: int,
        *,
        alpha: float | None,
        dropout: float,
        generator: torch.Generator | None,
    ) -> None:
        check_rank(self, rank)
        # PyTorch annotates them as tuples of any length, and padding as a string too.
        pairs = cast("tuple[Pair, Pair, Pair]", (base.kernel_size, base.stride, base.padding))
        groups, dtype, device = base.groups, master_dtype(base.weight), base.weight.device
        lora_a = Conv2d(
            base.in_channels // groups, rank, *pairs, bias=False, device="meta", dtype=dtype
        )
        lora_b = Conv2d(
            rank * groups,
            base.out_channels,
            1,
            groups=groups,
            bias=False,
            device="meta",
            dtype=dtype,
        )
        super().__init__(
            base,
            lora_a.to_empty(device=device),
            lora_b.to_empty(device=device),
            alpha=alpha,
            dropout=dropout,
            generator=generator,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, Cin, H, W]` to `[B, Cout, H', W']`, in the dtype of the base's output."""
        if self._is_linear_on(x) and runs_fused(x, self):
            weight, a, b = (
                layer.weight.flatten(1) for layer in (self.base, self.lora_a, self.lora_b)
            )
            pixels = x.permute(0, 2, 3, 1)
            y = lora_linear(pixels, weight, self.base.bias, a, b, self.scale)
            return y.permute(0, 3, 1, 2)
        y = self.base(x)
        if self.merged:
            return y
        a, groups = self.lora_a, self.base.groups
        down = self.dropout(x)
        if groups > 1:
            down = down.unflatten(1, (groups, -1)).flatten(0, 1)  # [B·groups, Cin/groups, H, W]
        down = F.conv2d(down, a.weight.to(x.dtype), None, a.stride, a.padding)
        if groups > 1:
            down = down.unflatten(0, (-1, groups)).flatten(1, 2)  # [B, groups·rank, H', W']
        up = F.conv2d(down, self.lora_b.weight.to(x.dtype), groups=groups)
        return torch.add(y, up, alpha=self.scale)

    def _is_linear_on(self, x: Tensor) -> bool:
        """Whether it is a linear layer on the pixels of x, which lie one after the other."""
        base = self.base
        alone = base.kernel_size == base.stride == (1, 1) and base.padding == (0, 0)
        fits = alone and base.groups == 1 and x.dim() == 4 and x.shape[1] == base.in_channels
        return fits and x.is_contiguous(memory_format=torch.channels_last)

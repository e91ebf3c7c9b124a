"""Two-dimensional convolution of maps `[B, C, H, W]`."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.types import Device

from eri.layers.checks import check_divides, shape_error

__all__ = ["Conv2d", "Conv2dConfig"]


@dataclass(frozen=True)
class Conv2dConfig:
    """The full geometry of a convolution; every pair is (height, width).

    Seed rows: A01, A37.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int = 1


class Conv2d(nn.Conv2d):
    """Cross-correlation with zero padding: `[B, Cin, H, W]` to `[B, Cout, H', W']`.

    H' = ⌊(H + 2·padding - kernel_size) / stride⌋ + 1, and the same for W'. `weight` is
    `[Cout, Cin / groups, kh, kw]`, `bias` is `[Cout]` or None. There is a bias unless it is
    declined: the convolutions of Stable Diffusion have one.

    Seed rows: A01, A35–A43.

    Args:
        in_channels: Cin.
        out_channels: Cout.
        kernel_size: one number for a square kernel, or (height, width).
        stride: one number or (height, width).
        padding: zeros on each side; one number or (height, width).
        groups: input and output channels are cut into so many groups that do not mix;
            `groups=in_channels` is a depthwise convolution.
        bias: whether there is a bias.

    Raises:
        ValueError: Cin or Cout is not divisible by `groups`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        *,
        groups: int = 1,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_divides(self, "groups", groups, "in_channels", in_channels)
        check_divides(self, "groups", groups, "out_channels", out_channels)
        super().__init__(
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

    @classmethod
    def with_bias(  # noqa: PLR0917 - the documented argument order
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        padding: int,
        bias: bool,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The documented constructor that takes the bias flag last."""
        return cls(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    @classmethod
    def from_config(
        cls,
        config: Conv2dConfig,
        *,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A convolution with the geometry of `config`."""
        return cls(
            config.in_channels,
            config.out_channels,
            config.kernel_size,
            config.stride,
            config.padding,
            groups=config.groups,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `[B, Cin, H, W]`.

        Raises:
            ValueError: the input is not four-dimensional or has another number of channels.
        """
        if input.dim() != 4 or input.shape[1] != self.in_channels:
            raise shape_error(self, input, f"[B, {self.in_channels}, H, W]")
        return super().forward(input)

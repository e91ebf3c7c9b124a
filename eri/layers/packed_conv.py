"""Convolution of maps whose batch is packed into the depth."""

import math

import torch
from torch import Tensor, nn
from torch.types import Device

from eri.layers.checks import check_divides, shape_error
from eri.layers.init import KAIMING_NORMAL_RELU, Initializer
from eri.layers.weights import OwnsWeights, Provider

__all__ = ["Conv"]


class Conv(nn.LazyConv2d, OwnsWeights):
    """Cross-correlation with square filters: `[B · C, H, W]` to `[B · F, H', W']`.

    The depth is batch-major: depth b · C + c is channel c of sample b. H' = ⌊(H + 2 · padding -
    filter_size) / stride⌋ + 1, and the same for W'. The channels C follow from the first input.
    `weight` is `[F, C, k, k]`; a provider sees it as `[F · C, k, k]`, sizes k × k × (C · F). `bias`
    is `[F]` and starts at zero; a provider does not see it.

    Seed rows: B10–B15.

    Args:
        filter_size: k.
        filters_count: F.
        batch_size: B.
        padding: zeros on each side.
        stride: step of the filter.
        init_weights: fills the weight, with fan_in = k² · C and fan_out = k² · F.
        provide_weights: called by `load_from_provider` with the weight.

    Raises:
        ValueError: a size is too small.
    """

    cls_to_become = None  # unlike PyTorch's lazy convolution it stays what it is

    def __init__(
        self,
        filter_size: int,
        filters_count: int,
        batch_size: int = 1,
        padding: int = 0,
        stride: int = 1,
        *,
        init_weights: Initializer = KAIMING_NORMAL_RELU,
        provide_weights: Provider | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = {
            "filter_size": (filter_size, 1),
            "filters_count": (filters_count, 1),
            "batch_size": (batch_size, 1),
            "padding": (padding, 0),
            "stride": (stride, 1),
        }
        for name, (found, least) in sizes.items():
            if found < least:
                raise ValueError(f"Conv: {name} must be at least {least}, found {found}")
        super().__init__(filters_count, filter_size, stride, padding, device=device, dtype=dtype)
        self.batch_size = batch_size
        self.init_weights = init_weights
        self.provide_weights = provide_weights

    def initialize_parameters(self, input: Tensor) -> None:
        """Create the weights for the channels of `input`; loaded ones stay."""
        super().initialize_parameters(self._maps(input))
        self.in_channels = self.weight.shape[1]

    def reset_parameters(self) -> None:
        """Fill the weight by `init_weights` and zero the bias, once the channels are known."""
        if self.in_channels == 0:
            return
        area = math.prod(self.kernel_size)
        self.init_weights.fill(self.weight, area * self.in_channels, area * self.out_channels)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def provider_views(self) -> tuple[Tensor | None, ...]:
        """The weight as `[F · C, k, k]`."""
        self._existing_weights()
        return (self.weight.detach().flatten(0, 1),)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `[B · C, H, W]`.

        Raises:
            ValueError: the input is not three-dimensional, its depth is not divisible by the batch
                size, or it has another number of channels than before.
        """
        maps = self._maps(input)
        if maps.shape[1] != self.in_channels:
            raise shape_error(self, input, f"[{self.batch_size} · {self.in_channels}, H, W]")
        return super().forward(maps).flatten(0, 1)

    def _maps(self, input: Tensor) -> Tensor:
        """`[B · C, H, W]` as `[B, C, H, W]`."""
        if input.dim() != 3:
            raise shape_error(self, input, "[B · C, H, W]")
        check_divides(self, "batch_size", self.batch_size, "depth", input.shape[0])
        return input.unflatten(0, (self.batch_size, -1))

    def extra_repr(self) -> str:
        """PyTorch's, and the batch size."""
        return f"{super().extra_repr()}, batch_size={self.batch_size}"

"""A learnable factor for each feature."""

import torch
from torch import Tensor, nn
from torch.types import Device

from eri.layers.checks import shape_error
from eri.layers.scale_rows import mul_rows
from eri.layers.weights import OwnsWeights, Provider

__all__ = ["MulRows"]


class MulRows(OwnsWeights):
    """y = x · weight, where every row of x is multiplied by the same `weight` `[width]`.

    The weight starts at ones, so a fresh layer is the identity. `RMSNorm` without a weight followed
    by `MulRows` is `RMSNorm` with one.

    Seed rows: B31–B33.

    Args:
        width: width of the rows.
        provide_weights: called by `load_from_provider` with the weight.
    """

    def __init__(
        self,
        width: int,
        *,
        provide_weights: Provider | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))
        self.provide_weights = provide_weights

    def forward(self, x: Tensor) -> Tensor:
        """Scale the last dimension of `[..., width]`.

        Raises:
            ValueError: the last dimension is not `width`.
        """
        if x.shape[-1:] != self.weight.shape:
            raise shape_error(self, x, f"[..., {self.weight.shape[0]}]")
        return mul_rows(x, self.weight)

    def extra_repr(self) -> str:
        """The width."""
        return f"width={self.weight.shape[0]}"

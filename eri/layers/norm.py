"""Normalisations whose statistics belong to one sample: LayerNorm, GroupNorm, RMSNorm.

None of them depends on the other samples of a batch. Statistics are accumulated in float32 or
better whatever the dtype of the input, as PyTorch's kernels do.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.types import Device

from eri.layers.checks import check_divides, shape_error
from eri.layers.scale_rows import rms_norm

__all__ = ["GroupNorm", "LayerNorm", "RMSNorm"]


class LayerNorm(nn.LayerNorm):
    """y = (x - mean) / √(var + eps) · weight + bias over the last dimension(s).

    The variance is the biased one. `weight` starts at ones and `bias` at zeros, both of shape
    `normalized_shape`, or both are None.

    Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv 1607.06450.
    Seed rows: A02, A45–A50, A131.

    Args:
        normalized_shape: the width, or the sizes of the last dimensions that share statistics.
        eps: added to the variance.
        elementwise_affine: whether `weight` and `bias` exist.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        *,
        elementwise_affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = [normalized_shape] if isinstance(normalized_shape, int) else [*normalized_shape]
        super().__init__(shape, eps, elementwise_affine, device=device, dtype=dtype)

    @classmethod
    def no_affine(
        cls, normalized_shape: int | Sequence[int], eps: float = 1e-5, *, device: Device = None
    ) -> Self:
        """A LayerNorm without weight and bias."""
        return cls(normalized_shape, eps, elementwise_affine=False, device=device)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `[..., *normalized_shape]`.

        Raises:
            ValueError: the last dimensions are not `normalized_shape`.
        """
        if input.shape[-len(self.normalized_shape) :] != self.normalized_shape:
            sizes = ", ".join(map(str, self.normalized_shape))
            raise shape_error(self, input, f"[..., {sizes}]")
        return super().forward(input)


class GroupNorm(nn.GroupNorm):
    """Normalise each group of channels of each sample: y = (x - mean) / √(var + eps) · w + b.

    Mean and biased variance are taken over `num_channels / num_groups` channels and all positions.
    `weight` starts at ones and `bias` at zeros, both `[num_channels]`, or both are None.

    Source: Wu, He, "Group Normalization", arXiv 1803.08494.
    Seed rows: A02, A52–A56, A131.

    Args:
        num_groups: number of groups.
        num_channels: number of channels of the input.
        eps: added to the variance.
        affine: whether `weight` and `bias` exist.

    Raises:
        ValueError: `num_channels` is not divisible by `num_groups`.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_divides(self, "num_groups", num_groups, "num_channels", num_channels)
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise a map `[B, C, H, W]`, a sequence `[B, C, L]` or vectors `[B, C]`.

        Raises:
            ValueError: the second dimension is not `num_channels`.
        """
        if input.shape[1:2] != (self.num_channels,):
            raise shape_error(self, input, f"[B, {self.num_channels}, ...]")
        return super().forward(input)


class RMSNorm(nn.Module):
    """y = x / √(mean(x²) + eps) · weight over the last dimension; the mean is not subtracted.

    One class for both documents: `RMSNorm(hidden_size)` has a weight of ones and eps 1e-6,
    `RMSNorm(elementwise_affine=False)` has no parameter, takes any width and has eps 1e-5.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.
    Seed rows: A02, A58–A60, A131, B36–B38.

    Args:
        hidden_size: width of the input; None accepts any width, without a weight only.
        eps: added to the mean square; None is 1e-6 with a weight and 1e-5 without.
        elementwise_affine: whether there is a weight.

    Raises:
        ValueError: a weight is asked for without `hidden_size`.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int | None = None,
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if elementwise_affine and hidden_size is None:
            raise ValueError("RMSNorm: elementwise_affine=True needs hidden_size, found None")
        self.hidden_size = hidden_size
        self.eps = eps if eps is not None else (1e-6 if elementwise_affine else 1e-5)
        self.register_parameter("weight", None)
        if elementwise_affine and hidden_size is not None:
            self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each row of `[..., hidden_size]`.

        Raises:
            ValueError: the last dimension is not `hidden_size`.
        """
        if x.dim() == 0 or (self.hidden_size is not None and x.shape[-1] != self.hidden_size):
            raise shape_error(self, x, f"[..., {self.hidden_size or 'W'}]")
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        affine = self.weight is not None
        return f"{self.hidden_size}, eps={self.eps}, elementwise_affine={affine}"

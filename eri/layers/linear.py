"""The affine map over the last dimension."""

import torch
from torch import Tensor, nn
from torch.types import Device

from eri.layers.checks import shape_error
from eri.layers.init import XAVIER_NORMAL_LINEAR, Initializer
from eri.layers.weights import OwnsWeights, Provider

__all__ = ["Linear"]


class Linear(nn.Linear, OwnsWeights):
    """y = x Wᵀ + b over the last dimension, for any number of leading dimensions.

    `weight` is `[out_features, in_features]`, `bias` is `[out_features]` or None; both start from
    U(±1/√in_features), PyTorch's own initialisation. The documented getters `in_features()` and
    `out_features()` are plain integer attributes here, as everything that reads a PyTorch linear
    layer expects.

    `Linear.lazy(features)` takes its input width from the first input. In either form a provider
    sees the weight as `[in_features, out_features]`, so that y = x W + b.

    Seed rows: A01, A10–A16, B24–B27.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether b exists.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)

    @classmethod
    def lazy(
        cls,
        features: int,
        bias: bool = False,
        *,
        init_weights: Initializer = XAVIER_NORMAL_LINEAR,
        provide_weights: Provider | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> "Linear":
        """A linear layer that learns its input width from its first input.

        Args:
            features: width of the output.
            bias: whether b exists; it starts at zero.
            init_weights: fills the weight, with fan_in and fan_out the two widths.
            provide_weights: called by `load_from_provider` with W `[in, out]` and b or None.
        """
        return LazyLinear(
            features,
            bias,
            init_weights=init_weights,
            provide_weights=provide_weights,
            device=device,
            dtype=dtype,
        )

    def provider_views(self) -> tuple[Tensor | None, ...]:
        """The weight as `[in_features, out_features]`, and the bias or None."""
        self._existing_weights()
        return self.weight.detach().T, None if self.bias is None else self.bias.detach()

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`.

        Raises:
            ValueError: the last dimension is not `in_features`.
        """
        if input.shape[-1:] != (self.in_features,):
            raise shape_error(self, input, f"[..., {self.in_features}]")
        return super().forward(input)


class LazyLinear(nn.LazyLinear, Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A `Linear` before its first input; it becomes a plain `Linear` there."""

    cls_to_become = Linear

    def __init__(
        self,
        features: int,
        bias: bool,
        *,
        init_weights: Initializer,
        provide_weights: Provider | None,
        device: Device,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(features, bias, device, dtype)
        self.init_weights = init_weights
        self.provide_weights = provide_weights

    def reset_parameters(self) -> None:
        """Fill the weight by `init_weights` and zero the bias, once the input width is known."""
        if self.in_features == 0:
            return
        self.init_weights.fill(self.weight, self.in_features, self.out_features)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

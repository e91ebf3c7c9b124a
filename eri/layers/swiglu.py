"""A gated feed-forward layer."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.types import Device

from eri.layers.init import KAIMING_NORMAL_RELU, Initializer
from eri.layers.linear import Linear
from eri.layers.weights import OwnsWeights, Provider

__all__ = ["SwiGLU"]


class SwiGLU(OwnsWeights):
    """y = (SiLU(x W1) ⊙ x W2) W3, without biases.

    W1 is the gate, W2 the value and W3 the way back. LLaMA's names differ: its w1 is W1, its w3
    is W2 and its w2 is W3. The three are linear layers `w1`, `w2` and `w3`, the width of x follows
    from the first input, and a provider sees `[in, hidden]`, `[in, hidden]`, `[hidden, features]`.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.
    Seed rows: B41–B44.

    Args:
        features_count: width of the output.
        hidden_size: width between.
        init_weights: fills the three weights by their own fans.
        provide_weights: called by `load_from_provider` with W1, W2 and W3.
    """

    def __init__(
        self,
        features_count: int,
        hidden_size: int,
        *,
        init_weights: Initializer = KAIMING_NORMAL_RELU,
        provide_weights: Provider | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()

        def lazy(features: int) -> Linear:
            return Linear.lazy(features, init_weights=init_weights, device=device, dtype=dtype)

        self.w1 = lazy(hidden_size)
        self.w2 = lazy(hidden_size)
        self.w3 = lazy(features_count)
        self.provide_weights = provide_weights

    def provider_views(self) -> tuple[Tensor | None, ...]:
        """W1, W2 and W3 as `[in, out]`."""
        return tuple(linear.provider_views()[0] for linear in (self.w1, self.w2, self.w3))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., features_count]`."""
        return self.w3(F.silu(self.w1(x)) * self.w2(x))

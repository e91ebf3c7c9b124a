"""A linear layer with a low-rank update."""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from eri.layers.linear import Linear
from eri.layers.lora import LoRALayer, check_rank, master_dtype

__all__ = ["LoRALinear"]


class LoRALinear(LoRALayer[nn.Linear]):
    """y = base(x) + scale · B(A(dropout(x))) with a frozen base.

    `base` is a linear layer, `lora_a.weight` is `[rank, in_features]`, drawn from
    U(±1/√in_features), and `lora_b.weight` is `[out_features, rank]`, zero. `scale` is
    alpha / rank, and 1.0 when no alpha is given. See `LoRALayer` for dtypes, `delta`, `merge`
    and `unmerge`.

    Source: Hu et al., "LoRA", arXiv 2106.09685, section 4.1.
    Seed rows: A20–A31.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: width between A and B.
        alpha: numerator of the scale.
        dropout: probability that an element of the adapter's input is dropped in training.
        bias: whether the base has a bias.
        dtype: of the base; A and B are float32 at least.

    Raises:
        ValueError: the rank is not a positive integer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        base = Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._adapt(base, rank, alpha=alpha, dropout=dropout, generator=None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Adapt an existing layer, which becomes `base` itself, unchanged but frozen.

        Args:
            linear: the layer to adapt.
            rank: width between A and B.
            alpha: numerator of the scale.
            dropout: probability that an element of the adapter's input is dropped in training.
            generator: a CPU generator to draw A with.
        """
        layer = cls.__new__(cls)
        layer._adapt(linear, rank, alpha=alpha, dropout=dropout, generator=generator)
        return layer

    def _adapt(
        self,
        base: nn.Linear,
        rank: int,
        *,
        alpha: float | None,
        dropout: float,
        generator: torch.Generator | None,
    ) -> None:
        check_rank(self, rank)
        dtype, device = master_dtype(base.weight), base.weight.device
        lora_a = Linear(base.in_features, rank, bias=False, device="meta", dtype=dtype)
        lora_b = Linear(rank, base.out_features, bias=False, device="meta", dtype=dtype)
        super().__init__(
            base,
            lora_a.to_empty(device=device),
            lora_b.to_empty(device=device),
            alpha=alpha,
            dropout=dropout,
            generator=generator,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`, in the dtype of the base's output."""
        y = self.base(x)
        if self.merged:
            return y
        down = F.linear(self.dropout(x), self.lora_a.weight.to(x.dtype))
        up = F.linear(down, self.lora_b.weight.to(x.dtype))
        return torch.add(y, up, alpha=self.scale)

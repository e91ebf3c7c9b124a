"""What every LoRA layer is: a frozen layer and a trainable update of low rank.

    y = base(x) + scale · B(A(dropout(x))),    scale = alpha / rank

A is drawn from U(±1/√fan_in) and B starts at zero, so a fresh layer gives exactly the output of its
base; at the first step only B has a gradient, from the second on both have.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

import math
from collections.abc import Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from eri.layers.dropout import Dropout

__all__ = ["Copier", "LoRALayer", "MatrixCopy", "base_of", "check_rank", "master_dtype"]

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


class MatrixCopy(NamedTuple):
    """A matrix, and where its copy is to be."""

    source: Tensor  # [rows, columns]
    target: Tensor  # the same, in its own type; its columns lie side by side


class Copier(Protocol):
    """Reads copies of the matrices of some layers, which have to be made anew when these change."""

    def copies(self) -> Iterator[MatrixCopy]:
        """All that it reads."""
        ...


class LoRALayer(nn.Module, Generic[Layer]):
    """A frozen `base` with the trainable pair `lora_a` (down) and `lora_b` (up).

    The base stays the module that was given: its weights, dtype and device are not touched. The
    pair is float32 at least, on the base's device, because a 16-bit weight loses most updates; the
    forward pass casts it to the dtype of its input.

    Args:
        base: the layer to adapt; its parameters stop requiring gradients.
        lora_a: the down layer to rank r, without bias, its weight not yet filled.
        lora_b: the up layer from rank r, without bias, its weight not yet filled.
        alpha: the update is scaled by alpha / rank; None is a scale of 1.0.
        dropout: probability that an element of the adapter's input is dropped in training.
        generator: a CPU generator to draw A with; None is PyTorch's global one.
    """

    def __init__(
        self,
        base: Layer,
        lora_a: Layer,
        lora_b: Layer,
        *,
        alpha: float | None,
        dropout: float,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.base: Layer = base.requires_grad_(False)
        self.lora_a: Layer = lora_a
        self.lora_b: Layer = lora_b
        self.dropout = Dropout(dropout)
        self.rank = lora_a.weight.shape[0]
        self.alpha = float(self.rank if alpha is None else alpha)
        self.scale = self.alpha / self.rank
        self._unmerged_weight: Tensor | None = None
        self.copied_by: Copier | None = None  # whoever reads copies of the pair
        self.reset_lora_parameters(generator)

    @property
    def merged(self) -> bool:
        """Whether the update is part of the base's weight now."""
        return self._unmerged_weight is not None

    def delta(self) -> Tensor:
        """The update scale · B A in the shape of the base's weight, float32 at least."""
        a, b = self.lora_a.weight, self.lora_b.weight
        dtype = master_dtype(a)
        with torch.autocast(a.device.type, enabled=False):
            product = b.flatten(1).to(dtype) @ a.flatten(1).to(dtype)
        return self.scale * product.view(self.base.weight.shape)

    @torch.no_grad()
    def reset_lora_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw A anew and zero B, so that the update is zero.

        The numbers are drawn on the CPU and are the same for every device and dtype.
        """
        a = self.lora_a.weight
        bound = 1 / math.sqrt(a[0].numel())
        draw = torch.empty(a.shape, dtype=torch.float32, device="cpu")
        a.copy_(draw.uniform_(-bound, bound, generator=generator))
        self.lora_b.weight.zero_()

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the base's weight, in its dtype; a merged layer stays as it is.

        A copy of the weight is kept for `unmerge`. A merged layer does not run the pair, so it
        gives it no gradient.
        """
        if self.merged:
            return
        weight = self.base.weight
        self._unmerged_weight = weight.clone()
        weight.copy_(weight + self.delta())

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the base exactly the weight that it had before `merge`."""
        if self._unmerged_weight is not None:
            self.base.weight.copy_(self._unmerged_weight)
            self._unmerged_weight = None

    def extra_repr(self) -> str:
        """Rank and scale."""
        return f"rank={self.rank}, alpha={self.alpha:g}, merged={self.merged}"


def base_of(layer: nn.Module) -> nn.Linear | nn.Conv2d:
    """The frozen layer of one with a low-rank update; any other layer is its own.

    Raises:
        TypeError: it is neither a linear layer nor a convolution.
    """
    base = layer.base if isinstance(layer, LoRALayer) else layer
    if not isinstance(base, nn.Linear | nn.Conv2d):
        raise TypeError(f"expected a linear layer or a convolution, found {type(base).__name__}")
    return base


def master_dtype(weight: Tensor) -> torch.dtype:
    """The dtype to train an adapter of `weight` in: float32, or float64 beside a float64 weight."""
    return torch.promote_types(weight.dtype, torch.float32)


def check_rank(layer: nn.Module, rank: int) -> None:
    """Refuse a rank that is not a positive integer.

    Raises:
        ValueError: naming the layer and the value found.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        name = type(layer).__name__
        raise ValueError(f"{name}: rank must be a positive integer, found {rank!r}")

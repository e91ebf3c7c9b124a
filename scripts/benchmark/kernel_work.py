"""What is timed of a kernel: its work, that of PyTorch beside it, and random operands for both."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Case", "Draw", "Work", "of_table"]

Norm = TypeVar("Norm", nn.LayerNorm, nn.GroupNorm)


class Work(NamedTuple):
    """One set of operands, and what is done with it."""

    ours: Callable[[], object]
    theirs: Callable[[], object]  # PyTorch's own operations for the same
    bytes: int


@dataclass(frozen=True)
class Draw:
    """Random operands.

    Attributes:
        device: where they are.
        dtype: of them.
    """

    device: torch.device
    dtype: torch.dtype = torch.bfloat16

    def __call__(self, *sizes: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(sizes, device=self.device, dtype=self.dtype)

    def single(self, *sizes: int) -> Tensor:
        """The same in float32."""
        return torch.randn(sizes, device=self.device)

    def frozen(self, norm: Norm) -> Norm:
        """A norm with an affine map that does not train."""
        norm = norm.to(self.device, self.dtype).requires_grad_(False)
        norm.weight.normal_().add_(1.0)
        norm.bias.normal_()
        return norm


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    kernel: str
    net: str  # family and batch
    shape: str
    make: Callable[[Draw], Work]


def of_table(net: str, table: Iterable[tuple[Any, ...]]) -> Iterator[Case]:
    """Cases of (kernel, shape, what makes the work, its arguments before the operands)."""
    for kernel, shape, make, *arguments in table:
        yield Case(kernel, net, shape, partial(make, *arguments))

"""Random zeroing of elements during training."""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eri import rng

__all__ = ["Dropout"]


class Dropout(nn.Dropout):
    """In training: zero each element with probability p and scale the others by 1 / (1 - p).

    In evaluation, or with p = 0, the input itself is returned. With a seed, the n-th call draws its
    mask from (seed, n) alone: two layers of one seed give the same sequence of masks, consecutive
    masks differ, the global generators are neither read nor moved, and the masks are the same on
    every device because they are drawn on the CPU. n is the buffer `calls`, so a saved and restored
    layer continues its sequence and `calls.zero_()` restarts it. Without a seed there is no buffer.

    Source: Srivastava et al., "Dropout", JMLR 15, 2014.
    Seed rows: A03, A80–A85, A133, B16–B19.

    Args:
        p: probability that an element is zeroed, in [0, 1].
        seed: for masks that can be repeated.

    Raises:
        ValueError: p is not in [0, 1].
    """

    calls: Tensor | None

    def __init__(self, p: float = 0.5, *, seed: int | None = None) -> None:
        super().__init__(p)
        self.seed = seed
        calls = None if seed is None else torch.zeros((), dtype=torch.int64)
        self.register_buffer("calls", calls)

    @classmethod
    def with_seed(cls, p: float, seed: int) -> Self:
        """A dropout whose sequence of masks follows from `seed` alone."""
        return cls(p, seed=seed)

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of a tensor of any shape."""
        if not self.training or self.p == 0:
            return input
        if self.seed is None or self.calls is None:
            return F.dropout(input, self.p)
        return input * _seeded_mask(input, self.p, self.seed, self.calls)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"p={self.p}" if self.seed is None else f"p={self.p}, seed={self.seed}"


def _seeded_mask(x: Tensor, p: float, seed: int, calls: Tensor) -> Tensor:
    """The mask of the next call, already scaled: 0 or 1 / (1 - p); counts the call."""
    generator = rng.generator(seed, "dropout", step=int(calls))
    calls += 1
    # float32 numbers whatever the dtype of x: bfloat16 has too few values near p.
    keep = torch.rand(x.shape, generator=generator, device="cpu") >= p
    scale = 1 / (1 - p) if p < 1 else 0.0
    return keep.to(x.device, x.dtype) * scale

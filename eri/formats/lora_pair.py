"""LoRA as every file format means it: two matrices and a scale for one module."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

__all__ = ["KeyTable", "LoRAPair", "Part"]

Part = Literal["down", "up", "alpha"]
KeyTable = dict[str, tuple[str, Part]]
"""Every key that a dialect may hold, and the module of ours and the part that it stands for."""


@dataclass(frozen=True, eq=False, slots=True)
class LoRAPair:
    """ΔW = alpha / r · up · down, in the shapes of the module it belongs to.

    Attributes:
        down: `[r, in]`, or `[r, in, kh, kw]` for a convolution.
        up: `[out, r]`, or `[out, r, 1, 1]` for a convolution.
        alpha: the update is scaled by alpha / r.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

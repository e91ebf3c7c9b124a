"""The activations as functions, with the numbers of the layers of the same name.

Seed rows: A76.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["gelu", "relu", "sigmoid", "silu", "tanh"]


def relu(x: Tensor) -> Tensor:
    """max(0, x) of each element."""
    return F.relu(x)


def gelu(x: Tensor, approximate: Literal["tanh", "none"] = "tanh") -> Tensor:
    """x · Φ(x) of each element; `"none"` is the exact form with erf."""
    return F.gelu(x, approximate=approximate)


def silu(x: Tensor) -> Tensor:
    """x · σ(x) of each element."""
    return F.silu(x)


def tanh(x: Tensor) -> Tensor:
    """tanh(x) of each element."""
    return torch.tanh(x)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) of each element."""
    return torch.sigmoid(x)

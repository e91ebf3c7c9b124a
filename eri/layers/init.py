"""Initial values: four in-place functions, and initialisers that are scaled by the fans of a layer.

The functions fill a tensor without recording gradients, keep its dtype, device and requires_grad,
and return it. For a weight `[out, in, *kernel]`, fan_in = in · kernel and fan_out = out · kernel;
groups are not looked at, as in PyTorch.

Sources: Glorot, Bengio, AISTATS 2010; He et al., arXiv 1502.01852.
Seed rows: A07, A130.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = [
    "GAINS",
    "KAIMING_NORMAL_RELU",
    "XAVIER_NORMAL_LINEAR",
    "Initializer",
    "constant",
    "kaiming_normal",
    "normal",
    "xavier_uniform",
]


def xavier_uniform(tensor: Tensor, gain: float = 1.0) -> Tensor:
    """Fill with U(-k, k), k = gain · √(6 / (fan_in + fan_out)).

    Seed rows: A120, A124.

    Raises:
        ValueError: the tensor has fewer than two dimensions, so no fans.
    """
    return nn.init.xavier_uniform_(tensor, gain)


def kaiming_normal(
    tensor: Tensor,
    a: float = 0.0,
    mode: Literal["fan_in", "fan_out"] = "fan_in",
    nonlinearity: Literal["leaky_relu", "relu", "tanh", "sigmoid", "linear"] = "leaky_relu",
) -> Tensor:
    """Fill with N(0, (gain / √fan)²); for leaky_relu with slope `a`, gain = √(2 / (1 + a²)).

    Seed rows: A121, A124.

    Raises:
        ValueError: `mode` is unknown, or the tensor has fewer than two dimensions.
    """
    return nn.init.kaiming_normal_(tensor, a, mode, nonlinearity)


def constant(tensor: Tensor, value: float) -> Tensor:
    """Fill with one value.

    Seed rows: A122.
    """
    return nn.init.constant_(tensor, value)


def normal(tensor: Tensor, mean: float = 0.0, std: float = 0.02) -> Tensor:
    """Fill with N(mean, std²).

    Seed rows: A123.

    Raises:
        ValueError: `std` is negative.
    """
    if std < 0:
        raise ValueError(f"normal: std must not be negative, found {std}")
    return nn.init.normal_(tensor, mean, std)


GAINS = {"linear": 1.0, "relu": math.sqrt(2), "tanh": 5 / 3, "sigmoid": 1.0}


@dataclass(frozen=True)
class Initializer:
    """Values scaled by k: U(-k, k) if uniform, N(0, k²) if normal.

    | scheme  | uniform                          | normal                           |
    |---------|----------------------------------|----------------------------------|
    | xavier  | k = gain · √(6 / (fan_in + fan_out)) | k = gain · √(2 / (fan_in + fan_out)) |
    | kaiming | k = gain · √(6 / fan_in)         | k = gain · √(2 / fan_in)         |
    | fixed   | k = gain                         | k = gain                         |

    The 2 of He's formula is under the root already, so with the gain of ReLU the values are √2
    wider than PyTorch's Kaiming initialisation: the document defines it so.

    Seed rows: B13.

    Args:
        scheme: how the fans enter.
        distribution: of the values.
        gain: by the activation that follows, see `GAINS`; for `"fixed"`, k itself.
    """

    scheme: Literal["xavier", "kaiming", "fixed"]
    distribution: Literal["uniform", "normal"]
    gain: float = 1.0

    def get_norm_k(self, fan_in: int, fan_out: int) -> float:
        """The scale k for a layer with these fans."""
        if self.scheme == "fixed":
            return self.gain
        fan = fan_in + fan_out if self.scheme == "xavier" else fan_in
        return self.gain * math.sqrt((6 if self.distribution == "uniform" else 2) / fan)

    @torch.no_grad()
    def fill(self, tensor: Tensor, fan_in: int, fan_out: int) -> Tensor:
        """Fill `tensor` in place and return it."""
        k = self.get_norm_k(fan_in, fan_out)
        if self.distribution == "uniform":
            return tensor.uniform_(-k, k)
        return tensor.normal_(0.0, k)


XAVIER_NORMAL_LINEAR = Initializer("xavier", "normal", GAINS["linear"])
KAIMING_NORMAL_RELU = Initializer("kaiming", "normal", GAINS["relu"])

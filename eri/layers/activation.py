"""Elementwise activations as layers, for tensors of any shape.

`eri.layers.functional` has each of them as a function. Usual choices are ReLU in convolutional nets
and GELU or SiLU in transformers.
"""

from typing import Literal

from torch import nn

__all__ = ["GELU", "NewReLu", "ReLU", "SiLU", "Sigmoid", "Swish", "Tanh"]


class ReLU(nn.ReLU):
    """max(0, x); NaN stays NaN and the gradient at 0 is 0.

    Seed rows: A05, A70, A75, A132, B07–B09.
    """


class GELU(nn.GELU):
    """x · Φ(x), with Φ the distribution function of the standard normal.

    The default is the tanh approximation, which the seed's own kernels use; Stable Diffusion's
    feed-forward layers need `approximate="none"`, the exact form with erf. They differ by at most
    4.8e-4.

    Source: Hendrycks, Gimpel, "Gaussian Error Linear Units", arXiv 1606.08415.
    Seed rows: A05, A71, A75, A132.

    Args:
        approximate: `"tanh"` or `"none"`.

    Raises:
        ValueError: `approximate` is neither.
    """

    def __init__(self, approximate: Literal["tanh", "none"] = "tanh") -> None:
        if approximate not in ("tanh", "none"):
            raise ValueError(f"GELU: approximate must be 'tanh' or 'none', found {approximate!r}")
        super().__init__(approximate)


class SiLU(nn.SiLU):
    """x · σ(x), also known as Swish.

    Source: Elfwing, Uchibe, Doya, arXiv 1702.03118; Ramachandran, Zoph, Le, arXiv 1710.05941.
    Seed rows: A05, A72, A75, A132.
    """


class Tanh(nn.Tanh):
    """tanh(x).

    Seed rows: A05, A73, A75.
    """


class Sigmoid(nn.Sigmoid):
    """σ(x) = 1 / (1 + exp(-x)).

    Seed rows: A05, A74, A75.
    """


Swish = SiLU
NewReLu = ReLU

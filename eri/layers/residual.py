"""A skip connection around a chain of layers."""

from torch import Tensor

from eri.layers.checks import shape_error
from eri.layers.layers import Layers

__all__ = ["Residual"]


class Residual(Layers):
    """y = x + layers(x).

    The chain keeps the shape, or gives one row of the same width, which is added to every row of x.
    Nothing else is broadcast.

    Source: He et al., "Deep Residual Learning", arXiv 1512.03385.
    Seed rows: B39, B40.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Add the chain's output to its input.

        Raises:
            ValueError: the chain's output is neither of the input's shape nor one row of its width.
        """
        out = super().forward(input)
        if out.shape == input.shape:
            return input + out
        width = input.shape[-1:]
        if out.shape[-1:] == width and out.numel() == width.numel():
            return input + out.flatten()
        expected = f"{list(input.shape)} or one row {list(width)} from the chain"
        raise shape_error(self, out, expected)

"""Another shape for the same numbers."""

import math

from torch import Tensor, nn

from eri.layers.checks import shape_error
from eri.layers.layout import whd_to_shape

__all__ = ["Reshape"]


class Reshape(nn.Module):
    """The input's elements in their order as a tensor of shape (D, H, W).

    The output shares the input's storage, and gradients pass unchanged. Only an input whose strides
    do not allow such a view (a transposed one, say) is copied.

    Seed rows: B34, B35.

    Args:
        w: the last size.
        h: the size before it.
        d: the first size.
    """

    def __init__(self, w: int, h: int = 1, d: int = 1) -> None:
        super().__init__()
        self.shape = whd_to_shape(w, h, d)

    def forward(self, x: Tensor) -> Tensor:
        """Reshape any tensor of D · H · W elements.

        Raises:
            ValueError: the number of elements differs.
        """
        if x.numel() != math.prod(self.shape):
            raise shape_error(self, x, f"with {math.prod(self.shape)} elements")
        return x.reshape(self.shape)

    def extra_repr(self) -> str:
        """The shape of the output."""
        return f"shape={list(self.shape)}"

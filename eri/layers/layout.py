"""The one rule between the sizes (W, H, D) of the second document and PyTorch shapes.

A buffer of sizes (W, H, D) is stored with W fastest: the element (w, h, d) lies at
d · H · W + h · W + w. That is a contiguous tensor of shape (D, H, W); a matrix of width W and
height H has shape (H, W). What that document writes as [a × b × c] is a tensor of shape
(c, b, a). Missing sizes are 1.
"""

from collections.abc import Sequence

__all__ = ["shape_to_whd", "whd_to_shape"]


def whd_to_shape(w: int, h: int = 1, d: int = 1) -> tuple[int, int, int]:
    """The PyTorch shape (D, H, W) of a buffer of sizes (W, H, D).

    Seed rows: B03.
    """
    return d, h, w


def shape_to_whd(shape: Sequence[int]) -> tuple[int, int, int]:
    """The sizes (W, H, D) of a PyTorch shape of at most three dimensions.

    Seed rows: B03.

    Raises:
        ValueError: there are more than three dimensions.
    """
    if len(shape) > 3:
        raise ValueError(f"(W, H, D) holds at most three dimensions, found {list(shape)}")
    w, h, d = (*reversed(shape), 1, 1, 1)[:3]
    return w, h, d

"""How attention cuts features into heads: head h owns the h-th contiguous slice of the features."""

from torch import Tensor

__all__ = ["merge_heads", "split_heads"]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`[..., T, heads · D]` to `[..., heads, T, D]`, a view.

    Seed rows: B47.
    """
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """`[..., heads, T, D]` to `[..., T, heads · D]`, the inverse of `split_heads`."""
    return x.transpose(-3, -2).flatten(-2)

r"""The sum of one or two maps and of a number for each channel, in place and in one pass.

$$y \leftarrow y + b_c + x$$

y is what a convolution without its bias b gave, x goes around it: y and x are read and y written,
6 bytes an element in 16 bits, 4 without x. A convolution that adds its bias afterwards, and the
addition of x after that, take 10. The sum is rounded once.

Limits of the kernel: sm_80 or newer; float32, float16 or bfloat16, all of one type; maps that lie
pixel by pixel (`channels_last`; an x that lies otherwise is copied); channels a multiple of 8, or
of 4 in float32; less than 2³² times 16 bytes.

Measured with `pytest -s -m gpu tests/layers/test_add_maps.py -k bandwidth`.
"""

import torch
from torch import Tensor
from torch.library import Library

from eri.layers.backend import use_kernel
from eri.layers.vectors import VECTOR, aligned, type_name, unsupported_type

__all__ = ["add_maps", "add_maps_reference", "unsupported"]

MOST_VECTORS = 2**32


def add_maps_reference(y: Tensor, x: Tensor | None, bias: Tensor) -> None:
    """What `add_maps` is, in PyTorch's own operations."""
    y.add_(bias[:, None, None])
    if x is not None:
        y.add_(x)


def unsupported(y: Tensor, x: Tensor | None, bias: Tensor) -> str | None:
    """Why the kernel cannot add these, in words; None where it can."""
    if (reason := unsupported_type("y", y)) is not None:
        return reason
    for name, other in {"x": x, "bias": bias}.items():
        if other is not None and other.dtype != y.dtype:
            return f"{name} is {type_name(other.dtype)}, y is {type_name(y.dtype)}"
    return _unsupported_map(y)


def _unsupported_map(y: Tensor) -> str | None:
    vector = VECTOR // y.element_size()
    if not 0 < y.numel() < vector * MOST_VECTORS:
        return f"y is {list(y.shape)}, too large or without elements"
    if y.shape[1] % vector:
        return f"y has {y.shape[1]} channels, not a multiple of {vector}"
    if not y.is_contiguous(memory_format=torch.channels_last):
        return "y does not lie pixel by pixel (channels_last)"
    if y.storage_offset() * y.element_size() % VECTOR:
        return f"y does not begin at a multiple of {VECTOR} bytes"
    return None


LIBRARY = Library("eri", "FRAGMENT")
LIBRARY.define(
    "add_maps_(Tensor(a!) y, Tensor? x, Tensor bias) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl(LIBRARY, "add_maps_", "CPU")(add_maps_reference)


@torch.library.register_fake("eri::add_maps_", lib=LIBRARY)
def _add_maps_fake(y: Tensor, x: Tensor | None, bias: Tensor) -> None:
    """Nothing is made."""


def add_maps(y: Tensor, x: Tensor | None, bias: Tensor) -> Tensor:
    """Add a map and a number for each channel to a map, in place.

    Args:
        y: `[B, C, H, W]`; the sum afterwards.
        x: of the shape of y; None for none.
        bias: `[C]`.

    Returns:
        y.

    Raises:
        ValueError: shapes that do not go together.
        ConfigError: the backend is `cuda` and the kernel cannot be used.
    """
    shape = y.shape if x is None else x.shape
    if y.dim() != 4 or shape != y.shape or bias.shape != y.shape[1:2]:
        found = f"{list(y.shape)}, {list(shape)} and {list(bias.shape)}"
        raise ValueError(f"add_maps: y, x and bias are {found}, not twice [B, C, H, W] and [C]")
    if use_kernel("add_maps", y.device, lambda: unsupported(y, x, bias)):
        if x is not None:
            x = aligned(x.contiguous(memory_format=torch.channels_last))
        torch.ops.eri.add_maps_(y, x, aligned(bias.contiguous()))
    else:
        add_maps_reference(y, x, bias)
    return y

"""What all kernels ask of tensors, which they read 16 bytes at a time; the sizes of vectors.h.

A *tail* is columns behind each row of a result that are left as memory had them, for a matrix
product to write there.
"""

import torch
from torch import Tensor

__all__ = [
    "VECTOR",
    "aligned",
    "aligned_rows",
    "type_name",
    "unsupported_tail",
    "unsupported_type",
    "with_tail",
]

VECTOR = 16  # bytes that a thread reads at once


def type_name(dtype: torch.dtype) -> str:
    """`bfloat16`, without the module."""
    return str(dtype).removeprefix("torch.")


def unsupported_type(name: str, tensor: Tensor) -> str | None:
    """Why no kernel takes numbers of this type, in words; None: some do."""
    if tensor.dtype in {torch.float32, torch.float16, torch.bfloat16}:
        return None
    return f"{name} is {type_name(tensor.dtype)}, not float32, float16 or bfloat16"


def unsupported_tail(tail: int, tensor: Tensor) -> str | None:
    """Why no kernel leaves such a tail behind rows of this type, in words; None: some do."""
    vector = VECTOR // tensor.element_size()
    if tail >= 0 and tail % vector == 0:
        return None
    return f"a tail of {tail} elements is no multiple of {vector}"


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied only if it does not begin where a vector may."""
    # where memory begins is aligned, and tensors that are only traced have no address
    return tensor.clone() if tensor.storage_offset() * tensor.element_size() % VECTOR else tensor


def aligned_rows(tensor: Tensor) -> Tensor:
    """Rows `[..., D]` at one stride, each of which begins where a vector may; copied only if they
    lie otherwise.
    """
    return aligned(tensor if _at_one_stride(tensor) else tensor.contiguous())


def _at_one_stride(tensor: Tensor) -> bool:
    if tensor.is_contiguous():
        return True
    sizes, strides = tensor.shape, tensor.stride()
    return (
        strides[-1] == 1
        and strides[-2] * tensor.element_size() % VECTOR == 0
        and all(strides[i] == strides[i + 1] * sizes[i + 1] for i in range(len(sizes) - 2))
    )


def with_tail(rows: Tensor, tail: int) -> Tensor:
    """Rows `[..., D]` as `[rows, D + tail]`; what is behind each is not written."""
    rows = rows.reshape(-1, rows.shape[-1])
    if not tail:
        return rows
    wide = rows.new_empty((rows.shape[0], rows.shape[1] + tail))
    wide[:, : rows.shape[1]] = rows
    return wide

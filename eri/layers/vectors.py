"""What all kernels ask of tensors, which they read 16 bytes at a time; the sizes of vectors.h."""

import torch
from torch import Tensor

__all__ = ["VECTOR", "aligned", "aligned_rows", "type_name", "unsupported_type"]

VECTOR = 16  # bytes that a thread reads at once


def type_name(dtype: torch.dtype) -> str:
    """`bfloat16`, without the module."""
    return str(dtype).removeprefix("torch.")


def unsupported_type(name: str, tensor: Tensor) -> str | None:
    """Why no kernel takes numbers of this type, in words; None: some do."""
    if tensor.dtype in {torch.float32, torch.float16, torch.bfloat16}:
        return None
    return f"{name} is {type_name(tensor.dtype)}, not float32, float16 or bfloat16"


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied only if it does not begin where a vector may."""
    # where memory begins is aligned, and tensors that are only traced have no address
    return tensor.clone() if tensor.storage_offset() * tensor.element_size() % VECTOR else tensor


def aligned_rows(tensor: Tensor) -> Tensor:
    """The tensor without gaps, copied only if it lies otherwise."""
    return aligned(tensor.contiguous())

"""Rows of up to three tensors side by side, with room behind them, in one launch.

A number is read once and written once: 4 bytes in 16 bits. `torch.cat` leaves no room, and copies
part by part where it has to.

Limits of the kernel: sm_80 or newer; float32, float16 or bfloat16; rows of a multiple of 16 bytes;
less than 2³² times 16 bytes. Rows that do not lie at one stride are copied before.

Measured with `pytest -s -m gpu tests/layers/test_join_rows.py -k bandwidth`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import Library

from eri.layers.backend import use_kernel
from eri.layers.vectors import VECTOR, aligned_rows, unsupported_tail, unsupported_type, with_tail

__all__ = ["join_rows", "join_rows_reference", "unsupported"]

MOST = 3  # tensors
MOST_VECTORS = 2**32


def join_rows_reference(parts: Sequence[Tensor], tail: int) -> Tensor:
    """What `join_rows` is, in PyTorch's own operations."""
    return with_tail(parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1), tail)


def unsupported(parts: Sequence[Tensor], tail: int = 0) -> str | None:
    """Why the kernel cannot join these, in words; None where it can."""
    first = parts[0]
    if (reason := unsupported_type("rows", first)) is not None:
        return reason
    vector = VECTOR // first.element_size()
    if first.shape[1] % vector:
        return f"rows of {first.shape[1]} elements, not a multiple of {vector}"
    if len(first) * (len(parts) * first.shape[1] + tail) >= vector * MOST_VECTORS:
        return f"{len(parts)} times {list(first.shape)} are too many elements"
    return unsupported_tail(tail, first)


LIBRARY = Library("eri", "FRAGMENT")
LIBRARY.define(
    "join_rows(Tensor first, Tensor? second, Tensor? third, int tail) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(LIBRARY, "join_rows", "CPU")
def _join_rows_on_cpu(
    first: Tensor, second: Tensor | None, third: Tensor | None, tail: int
) -> Tensor:
    parts = [part for part in (first, second, third) if part is not None]
    return join_rows_reference(parts, tail) if parts[1:] or tail else first.clone()


@torch.library.register_fake("eri::join_rows", lib=LIBRARY)
def _join_rows_fake(
    first: Tensor, second: Tensor | None, third: Tensor | None, tail: int
) -> Tensor:
    count = 1 + (second is not None) + (third is not None)
    return first.new_empty((first.shape[0], count * first.shape[1] + tail))


def join_rows(parts: Sequence[Tensor], tail: int = 0) -> Tensor:
    """One to three of `[T, D]` as `[T, n·D + tail]`; a single one without a tail is itself.

    Raises:
        ConfigError: the backend is `cuda` and the kernel cannot be used.
    """
    if len(parts) == 1 and tail == 0:
        return parts[0]
    if not use_kernel("join_rows", parts[0].device, lambda: unsupported(parts, tail)):
        return join_rows_reference(parts, tail)
    first, second, third = [*map(aligned_rows, parts), None, None][:MOST]
    return torch.ops.eri.join_rows(first, second, third, tail)

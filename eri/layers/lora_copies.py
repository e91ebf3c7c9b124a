"""Many small matrices copied in one launch, into another type and another layout.

An adapter trains in float32, as hundreds of matrices; products read them in 16 bits, beside frozen
weights. A thread takes one number after the other: 4 bytes are read and 2 written.

Limits of the kernel: sm_80 or newer; float32 into float32, float16 or bfloat16. Whatever else is
copied matrix by matrix.

Measured with `pytest -s -m gpu tests/layers/test_lora_copies.py -k bandwidth`.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.library import Library

from eri.layers.backend import use_kernel
from eri.layers.lora import MatrixCopy

__all__ = ["LoRACopies", "unsupported"]

NUMBERS = 7  # of a copy, in the table: see csrc/lora_copies.h
MOST_NUMBERS = 2**31  # of a matrix: fewer
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


LIBRARY = Library("eri", "FRAGMENT")
LIBRARY.define("lora_copies(Tensor table, int type) -> ()", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("eri::lora_copies", lib=LIBRARY)
def _lora_copies_fake(table: Tensor, type: int) -> None:
    return None


class LoRACopies:
    """Copies that are made again and again, from the same places to the same places.

    Args:
        copies: all on one device, the targets of one type.
    """

    def __init__(self, copies: Iterable[MatrixCopy]) -> None:
        self.copies = [copy for copy in copies if copy.target.numel() > 0]
        self._table: Tensor | None = None

    @torch.no_grad()
    def __call__(self) -> None:
        """Make them; in a CUDA graph, too, once they were made outside of it.

        Raises:
            ConfigError: the backend is `cuda` and the kernel cannot be used.
        """
        if not self.copies:
            return
        device = self.copies[0].target.device
        if not use_kernel("lora_copies", device, lambda: unsupported(self.copies)):
            for source, target in self.copies:
                target.copy_(source)
            return
        if self._table is None:
            self._table = torch.tensor([_row(copy) for copy in self.copies]).to(device)
        torch.ops.eri.lora_copies(self._table, TYPES[self.copies[0].target.dtype])


def unsupported(copies: Sequence[MatrixCopy]) -> str | None:
    """Why the kernel cannot make these copies, in words; None where it can."""
    types = {copy.target.dtype for copy in copies}
    if len(types) > 1 or not types <= TYPES.keys():
        return f"it would copy into {_names(types)}, not into one of float32, float16 or bfloat16"
    types = {copy.source.dtype for copy in copies}
    if types != {torch.float32}:
        return f"it would copy from {_names(types)}, not from float32"
    for source, target in copies:
        if source.device != copies[0].target.device or target.device != copies[0].target.device:
            return f"a copy is from {source.device} to {target.device}"
        if target.numel() >= MOST_NUMBERS:
            return f"a copy of {list(source.shape)} is too large"
        if source.shape != target.shape or target.ndim != 2 or target.stride(1) != 1:
            return f"a copy of {list(source.shape)} does not lie in rows of {list(target.shape)}"
    return None


def _names(types: Iterable[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))


def _row(copy: MatrixCopy) -> list[int]:
    source, target = copy
    rows, columns = target.shape
    places = [source.data_ptr(), target.data_ptr()]
    return [*places, rows, columns, *source.stride(), target.stride(0)]

"""Running out of memory, told as what it is and what to do about it."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from eri.errors import MemoryLimitError

__all__ = ["memory_errors"]

WORDS = re.compile(
    r"out of memory|(can't|cannot) allocate memory|not enough memory|bad_?alloc"
    r"|ALLOC_FAILED|ALLOCATION_FAILED",
    re.IGNORECASE,
)
"""What a plain RuntimeError says of it: PyTorch's CPU allocator, the CUDA driver and runtime,
cuBLAS, cuDNN and C++."""


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turns every way in which Python and PyTorch run out of memory into a MemoryLimitError."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not _is_of_memory(error):
            raise
        raise MemoryLimitError(
            "out of memory; what was saved before is untouched",
            hint="try train.memory: small, which runs a batch in the least memory, or a smaller "
            "data.resolution or sample.size",
        ) from error


def _is_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came of, is of memory.

    A recording that ends early for want of memory may fail once more where it is closed.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and WORDS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False

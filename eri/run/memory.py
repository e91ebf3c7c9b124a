"""Running out of memory, told as what it is and what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from eri.errors import MemoryLimitError

__all__ = ["memory_errors"]

CPU_ALLOCATOR = "can't allocate memory"  # PyTorch's CPU allocator raises a plain RuntimeError


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turns every way in which Python and PyTorch run out of memory into a MemoryLimitError."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _error() from error
    except RuntimeError as error:
        if CPU_ALLOCATOR not in str(error):
            raise
        raise _error() from error


def _error() -> MemoryLimitError:
    return MemoryLimitError(
        "out of memory; what was saved before is untouched",
        hint="try train.memory: small, which runs a batch in the least memory, or a smaller "
        "data.resolution or sample.size",
    )

import pytest
import torch

from eri.errors import MemoryLimitError
from eri.run.memory import memory_errors


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_every_kind_is_told_as_one(error: Exception) -> None:
    with pytest.raises(MemoryLimitError, match="out of memory") as told, memory_errors():
        raise error
    assert told.value.hint is not None and "train.memory: small" in told.value.hint


def test_the_real_thing() -> None:
    with pytest.raises(MemoryLimitError), memory_errors():
        torch.empty(2**60, dtype=torch.uint8)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shape"), memory_errors():
        raise RuntimeError("a shape is wrong")

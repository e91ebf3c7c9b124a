import errno

import pytest
import torch

from eri.errors import ConfigError, MemoryLimitError
from eri.run.memory import memory_errors


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_every_kind_is_told_as_one(error: Exception) -> None:
    with pytest.raises(MemoryLimitError, match="out of memory") as told, memory_errors():
        raise error
    assert told.value.hint is not None and "train.memory: small" in told.value.hint


def test_the_real_thing() -> None:
    with pytest.raises(MemoryLimitError), memory_errors():
        torch.empty(2**60, dtype=torch.uint8)


def test_what_fails_again_where_a_recording_is_closed_is_still_of_memory() -> None:
    with pytest.raises(MemoryLimitError), memory_errors():
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a shape is wrong"),
        OSError(errno.ENOSPC, "No space left on device"),
        ConfigError("out of memory"),
        ValueError("out of memory"),
    ],
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as passed, memory_errors():
        raise error
    assert passed.value is error

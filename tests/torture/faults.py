"""A disk that fails: full after some bytes, broken at some call, or with a limit on files."""

import errno
import itertools
import os
import resource
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

__all__ = ["failing", "filling", "limit_file_size"]

WRITES = set("wxa+")


class _Narrow:
    """An open file on a disk with so many bytes left."""

    def __init__(self, file: Any, left: list[int]) -> None:
        self._file, self._left = file, left

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, content: Any) -> int:
        size = memoryview(content).nbytes if not isinstance(content, str) else len(content)
        fits = min(size, self._left[0])
        self._left[0] -= fits
        if fits < size:
            self._file.write(content[:fits] if isinstance(content, str) else bytes(content)[:fits])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(content)


def filling(monkeypatch: pytest.MonkeyPatch, room: int) -> list[int]:
    """Let the files that are opened from now on hold so many bytes together.

    Returns:
        A list of one number, the bytes that are left.
    """
    left, right = [room], Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = right(self, mode, *args, **kwargs)
        return _Narrow(file, left) if WRITES & set(mode) else file

    monkeypatch.setattr(Path, "open", opened)
    return left


def failing(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, call: int, number: int
) -> Callable[[], int]:
    """Let a function of the system fail at its n-th call, counted from 0.

    Args:
        monkeypatch: undoes it.
        owner: of the function, such as `os`.
        name: of the function.
        call: that fails.
        number: of the error.

    Returns:
        A function that tells how often it was called.
    """
    right, counter = getattr(owner, name), itertools.count()
    called = [0]

    def wrong(*args: Any, **kwargs: Any) -> Any:
        called[0] += 1
        if next(counter) == call:
            raise OSError(number, os.strerror(number))
        return right(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrong)
    return lambda: called[0]


def limit_file_size(size: int) -> None:
    """Let this process write no file larger than that; a hook of the fork server."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

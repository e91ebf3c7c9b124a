import errno
import os
from pathlib import Path

import pytest

from eri.errors import DiskError
from eri.files import (
    disk_errors,
)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permission"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "read or write error"),
    ],
)
def test_the_reason_of_the_system_is_said_in_words(number: int, words: str) -> None:
    with pytest.raises(DiskError, match=words) as caught, disk_errors(Path("out\x1b")):
        raise OSError(number, os.strerror(number))
    assert caught.value.where == "out\\x1b"
    assert caught.value.hint is not None

"""A file that is there whole, or not at all."""

import errno
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from eri.files.disk import disk_errors

__all__ = ["TEMPORARY_PREFIX", "atomic_write", "sync_folder"]

TEMPORARY_PREFIX = ".writing-"


@contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Opens a binary file that appears at `path`, whole, when the block ends without an error.

    The mode of the file is `0666 & ~umask`. A link at `path` is replaced, not followed. Without
    `durable` nothing is flushed: a power cut, not a crash, may then leave a file that is cut.

    Raises:
        DiskError: the disk is full, or the path may not be written; nothing is left behind.
    """
    temporary = path.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    with disk_errors(path), ExitStack() as ending:
        ending.callback(temporary.unlink, missing_ok=True)
        with temporary.open("xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    if sys.platform == "win32":
        return  # a folder cannot be opened there; the rename itself is journaled
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network and FUSE file systems know no flush of a folder; a real failure is another
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(descriptor)

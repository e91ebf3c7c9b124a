"""A folder that one process holds."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from eri.errors import DiskError, OccupiedError
from eri.files.disk import disk_errors
from eri.printable import printable

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["LOCK_FILE", "lock"]

LOCK_FILE = "run.lock"


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process; the system lets go when the process dies, however it dies.

    Raises:
        OccupiedError: another process holds it; names that process.
        DiskError: the lock file cannot be written, or the file system has no locks.
    """
    path = folder / LOCK_FILE
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _acquire(descriptor, path)
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        holder = f"process {os.getpid()} on {socket.gethostname()} since {started}"
        with disk_errors(path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, holder.encode())
        yield
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: Path) -> None:
    try:
        _lock_without_waiting(descriptor)
    except (BlockingIOError, PermissionError) as error:
        holder = os.read(descriptor, 300).decode(errors="replace") or "another process"
        raise OccupiedError(
            f"the folder is in use by {printable(holder)}",
            where=printable(path.parent),
            hint="wait until it has finished, stop it, or choose another output folder",
        ) from error
    except OSError as error:
        raise DiskError(
            f"the file system cannot lock files: {error.strerror}",
            where=printable(path),
            hint="choose an output folder on a local disk",
        ) from error


def _lock_without_waiting(descriptor: int) -> None:
    if sys.platform == "win32":
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # behind the text, which stays readable
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

"""A folder that one process holds."""

import errno
import os
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

from eri.errors import DiskError, OccupiedError
from eri.files.disk import disk_errors
from eri.printable import printable

if sys.platform == "win32":
    import msvcrt

    FLAGS = os.O_RDWR | os.O_CREAT
else:
    import fcntl

    FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK

__all__ = ["LOCK_FILE", "lock"]

LOCK_FILE = "run.lock"


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process; the system lets go when the process dies, however it dies.

    Raises:
        OccupiedError: another process holds it; names that process.
        DiskError: the lock file cannot be written or is something else, the file system has no
            locks, or the folder is gone.
    """
    path = folder / LOCK_FILE
    descriptor = _held(path)
    try:
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        holder = f"process {os.getpid()} on {socket.gethostname()} since {started}"
        with disk_errors(path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, holder.encode())
        yield
    finally:
        os.close(descriptor)


def _held(path: Path) -> int:
    """The lock file, open and locked."""
    while True:
        with ExitStack() as closing:
            descriptor = _open(path)
            closing.callback(os.close, descriptor)
            _acquire(descriptor, path)
            if _is_at(descriptor, path):  # else its last holder deleted it before the lock was free
                closing.pop_all()
                return descriptor


def _open(path: Path) -> int:
    """Open the lock file, which is a plain one: what a link leads to would be overwritten."""
    try:
        with disk_errors(path):
            descriptor = os.open(path, FLAGS, 0o666)
    except DiskError as error:
        if getattr(error.__cause__, "errno", None) == errno.ELOOP and path.is_symlink():
            raise _no_lock_file("a link", path) from error
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise _no_lock_file("no plain file" if found.st_nlink == 1 else "a hard link", path)
    return descriptor


def _no_lock_file(kind: str, path: Path) -> DiskError:
    return DiskError(
        f"the lock file is {kind}", where=printable(path), hint="look at it, and delete it"
    )


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


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

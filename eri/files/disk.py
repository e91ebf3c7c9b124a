"""What the system says of a disk, told as what is wrong and what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eri.errors import DiskError
from eri.printable import printable

__all__ = ["DISK_PROBLEMS", "disk_errors"]

# errno -> (what is wrong with the path, one thing to do)
DISK_PROBLEMS = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another folder"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another folder"),
    errno.EFBIG: ("the file would be larger than the limit on file sizes", "raise `ulimit -f`"),
    errno.EACCES: ("permission denied", "choose a folder that you may write"),
    errno.EPERM: ("not permitted", "choose a folder that you may write"),
    errno.EROFS: ("the file system is read-only", "choose a folder that you may write"),
    errno.ENOENT: ("no such file or folder", "check the path; was it removed meanwhile?"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another path"),
    errno.EISDIR: ("this is a folder, not a file", "choose another path"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter name"),
    errno.ELOOP: ("the links of the path lead in a circle", "choose another path"),
    errno.EXDEV: ("the folder lies on two disks", "choose a folder on one disk"),
    errno.ESTALE: ("the network drive has lost the file", "connect the drive again"),
    errno.EIO: ("the disk reported a read or write error", "check the disk"),
}


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turns every OSError inside into a DiskError that names the file it is about.

    Args:
        path: named when the error itself names none.
    """
    try:
        yield
    except OSError as error:
        what, hint = DISK_PROBLEMS.get(error.errno or 0, (error.strerror or str(error), None))
        where = error.filename if isinstance(error.filename, (str, Path)) else path
        raise DiskError(what, where=printable(where), hint=hint) from error

"""SHA-256 of large files, worked out once: a model of 7 GB takes 6 s each time that it is read."""

import os
import time
from pathlib import Path

from eri.files import disk_errors, sha256
from eri.run.remembered import recall, remember

__all__ = ["sha256_of"]

LARGE = 2**26  # bytes; smaller files are read anew
SETTLED = 2_000_000_000  # nanoseconds; the times of some file systems are no finer (FAT)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex, remembered while the file is the same by its inode.

    The same means: device, number, size, and both times, of its content and of its inode, which
    no program can set back. One that changed a moment ago may change again within the same tick of
    the file system's clock, so it is not remembered (as git's index has it: "racy" entries).

    Raises:
        DiskError: it cannot be read.
    """
    with disk_errors(path):
        before = path.stat()
    if before.st_size < LARGE:
        return sha256(path)
    name = str(path.resolve())
    known = recall("sha256", name)
    if isinstance(known, list) and known[:-1] == _same(before) and isinstance(known[-1], str):
        return known[-1]
    began = time.time_ns()
    digest = sha256(path)
    if began - max(before.st_mtime_ns, before.st_ctime_ns) > SETTLED:
        remember("sha256", name, [*_same(before), digest])
    return digest


def _same(stat: os.stat_result) -> list[int]:
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]

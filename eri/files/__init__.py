"""Files that are whole or absent: atomic writes, committed folders, locks, hashes, the cache.

A file is written under a temporary name, flushed to the disk and renamed, and the folder is flushed
after it; a crash at any moment leaves the old file or the new one. A folder is committed the same
way, with a manifest of sizes and hashes written last, because a valid header proves nothing about
the bytes behind it. Calls that only POSIX has are made in here alone, beside their branch for
Windows.
"""

from eri.files.atomic import TEMPORARY_PREFIX, atomic_write
from eri.files.commit import (
    STAGING_PREFIX,
    FileEntry,
    Manifest,
    commit_folder,
    remove_folder,
    sha256,
    sweep_staging,
    verify_folder,
)
from eri.files.disk import DISK_PROBLEMS, disk_errors
from eri.files.locks import LOCK_FILE, lock
from eri.files.places import cache_dir, contained, require_space, run_name
from eri.files.streams import Outlet, open_standard_streams

__all__ = [
    "DISK_PROBLEMS",
    "LOCK_FILE",
    "STAGING_PREFIX",
    "TEMPORARY_PREFIX",
    "FileEntry",
    "Manifest",
    "Outlet",
    "atomic_write",
    "cache_dir",
    "commit_folder",
    "contained",
    "disk_errors",
    "lock",
    "open_standard_streams",
    "remove_folder",
    "require_space",
    "run_name",
    "sha256",
    "sweep_staging",
    "verify_folder",
]

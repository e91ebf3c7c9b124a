"""Files that are whole or absent: atomic writes, committed folders, locks, hashes, the cache.

A file is written under a temporary name, flushed to the disk and renamed, and the folder is flushed
after it; a crash at any moment leaves the old file or the new one. A folder is committed the same
way, with a manifest of sizes and hashes written last, because a valid header proves nothing about
the bytes behind it. Calls that only POSIX has are made here alone, beside their branch for Windows.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from eri.errors import DiskError, ModelError, OccupiedError
from eri.printable import printable

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = [
    "LOCK_FILE",
    "FileEntry",
    "Manifest",
    "atomic_write",
    "cache_dir",
    "commit_folder",
    "contained",
    "disk_errors",
    "lock",
    "require_space",
    "run_name",
    "sha256",
    "sweep_staging",
    "verify_folder",
]

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
STAGING_PREFIX = ".staging-"
TEMPORARY_PREFIX = ".writing-"
LOCK_FILE = "run.lock"

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
            _sync_folder(path.parent)


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a committed folder: its size in bytes and the SHA-256 of its bytes, in hex."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a committed folder is, as its writer stated it, and its files by path ("/") below it."""

    identity: Mapping[str, Any]
    files: Mapping[str, FileEntry]


@contextmanager
def commit_folder(final: Path, *, identity: Mapping[str, Any]) -> Iterator[Path]:
    """Yields a staging folder that becomes `final`, whole, when the block ends without an error.

    The order is: the files, each flushed to the disk; the manifest; the staging folder; the rename;
    the parent folder. The staging folder is private (0700), the final one has `0777 & ~umask`.

    Args:
        final: must not exist; its parent must.
        identity: JSON values, kept in the manifest.

    Raises:
        OccupiedError: `final` exists.
        DiskError: the disk is full, or the folder may not be written; nothing is left behind.
    """
    staging = final.parent / f"{STAGING_PREFIX}{final.name}-{secrets.token_hex(4)}"
    with disk_errors(final):
        _refuse_existing(final)
        try:
            staging.mkdir()
            mode = stat.S_IMODE(staging.stat().st_mode)  # 0777 & ~umask, as the system made it
            staging.chmod(0o700)
            yield staging
            _write_manifest(staging, identity)
            staging.chmod(mode)
            _refuse_existing(final)
            staging.rename(final)
            _sync_folder(final.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def verify_folder(folder: Path) -> Manifest:
    """Reads every file of a committed folder and compares it with the manifest.

    Raises:
        ModelError: the manifest is missing or unreadable, or a file is missing or differs.
    """
    manifest = _read_manifest(folder)
    problems = [
        f"{printable(name)}: {problem}"
        for name, entry in manifest.files.items()
        if (problem := _difference(contained(folder, name), entry)) is not None
    ]
    if problems:
        raise ModelError(
            f"{len(problems)} of {len(manifest.files)} files are damaged",
            where=printable(folder),
            hint="use an older folder, or copy this one again",
            problems=problems,
        )
    return manifest


def sweep_staging(folder: Path) -> None:
    """Removes what a crash left half-written directly in `folder`; the caller holds its lock."""
    with disk_errors(folder):
        for entry in list(folder.iterdir()):
            if entry.name.startswith(STAGING_PREFIX):
                shutil.rmtree(entry)
            elif entry.name.startswith(TEMPORARY_PREFIX):
                entry.unlink()


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with disk_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def cache_dir() -> Path:
    """The folder for what can be computed again: `$ERI_CACHE`, else `$XDG_CACHE_HOME/eri` or
    `~/.cache/eri`; made if needed, readable by its owner only.

    Raises:
        DiskError: it cannot be made, or belongs to somebody else.
    """
    path = _cache_path()
    with disk_errors(path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if sys.platform == "win32":
            return path
        found = path.stat()
        if found.st_uid != os.getuid():
            raise DiskError(
                "the cache folder belongs to another user",
                where=printable(path),
                hint="set ERI_CACHE to a folder of your own",
            )
        if stat.S_IMODE(found.st_mode) != 0o700:
            path.chmod(0o700)
    return path


def require_space(folder: Path, size: int) -> None:
    """Refuses to begin what the disk cannot hold.

    Args:
        folder: where the files will be; it need not exist yet.
        size: the bytes needed.

    Raises:
        DiskError: fewer bytes are free.
    """
    whole = folder.absolute()
    existing = next(path for path in (whole, *whole.parents) if path.exists())
    with disk_errors(folder):
        free = shutil.disk_usage(existing).free
    if free < size:
        raise DiskError(
            f"{size / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free",
            where=printable(folder),
            hint="free some space or choose another folder",
        )


def contained(root: Path, name: str, *, links_into: Sequence[Path] = ()) -> Path:
    """The path `name` below `root`, for names that come out of a file; `links_into` names other
    folders that a link, not the name itself, may lead into.

    Raises:
        ModelError: the name is absolute or leads out of `root`, also through a link.
    """
    try:
        below = Path(os.path.normpath(root / name)).is_relative_to(os.path.normpath(root))
        homes = (root, *links_into) if below else (root,)
        real = Path(os.path.realpath(root / name))
        inside = any(real.is_relative_to(os.path.realpath(home)) for home in homes)
    except ValueError:  # a NUL or a lone surrogate: no file has such a name
        inside = False
    if not inside:
        what = f"the name '{printable(name)}' leads out of its folder"
        raise ModelError(what, where=printable(root))
    return root / name


def run_name(text: str) -> str:
    """A name made from `text` that every file system takes: `[A-Za-z0-9._-]`, at most 100 bytes."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:100].strip("-.")
    reserved = re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name)
    return f"run-{name}" if reserved else name or "run"


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise OccupiedError(
            "this exists already and is never overwritten",
            where=printable(path),
            hint="choose another name, or move it away",
        )


def _write_manifest(staging: Path, identity: Mapping[str, Any]) -> None:
    files = {}
    for path in sorted(staging.rglob("*")):
        if path.is_dir():
            _sync_folder(path)
            continue
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        entry = FileEntry(size=path.stat().st_size, sha256=sha256(path))
        files[path.relative_to(staging).as_posix()] = asdict(entry)
    content = {"format": MANIFEST_FORMAT, "identity": dict(identity), "files": files}
    with atomic_write(staging / MANIFEST) as file:
        file.write(json.dumps(content | {"complete": True}, indent=2, allow_nan=False).encode())


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        with disk_errors(path):
            content = json.loads(path.read_bytes())
        if content["format"] != MANIFEST_FORMAT or content["complete"] is not True:
            raise ValueError(f"format {content['format']!r}")
        files = {name: FileEntry(**entry) for name, entry in content["files"].items()}
        return Manifest(identity=dict(content["identity"]), files=files)
    except (DiskError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"the manifest cannot be read: {printable(str(error))}",
            where=printable(path),
            hint="use an older folder, or copy this one again",
        ) from error


def _difference(path: Path, entry: FileEntry) -> str | None:
    if not os.path.isfile(path):  # also for a name that the system does not take
        return "the file is missing"
    size = path.stat().st_size
    if size != entry.size:
        return f"the file has {size} bytes, the manifest says {entry.size}"
    if sha256(path) != entry.sha256:
        return "the bytes differ from those that were written (SHA-256)"
    return None


def _cache_path() -> Path:
    chosen = os.environ.get("ERI_CACHE")
    if chosen:
        return Path(chosen).absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):  # the XDG specification says to ignore a relative one
        return Path(shared) / "eri"
    try:
        return Path.home() / ".cache" / "eri"
    except RuntimeError as error:
        raise DiskError("you have no home folder for the cache", hint="set ERI_CACHE") from error


def _sync_folder(folder: Path) -> None:
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

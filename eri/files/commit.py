"""Folders that are committed with a manifest, and verified against it."""

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eri.errors import DiskError, ModelError, OccupiedError
from eri.files.atomic import TEMPORARY_PREFIX, atomic_write, sync_folder
from eri.files.disk import disk_errors
from eri.files.places import contained
from eri.printable import printable

__all__ = [
    "STAGING_PREFIX",
    "FileEntry",
    "Manifest",
    "commit_folder",
    "remove_folder",
    "sha256",
    "sweep_staging",
    "verify_folder",
]

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
DIGEST = "sha256"  # of the manifest itself
STAGING_PREFIX = ".staging-"


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
            sync_folder(final.parent)
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


def remove_folder(folder: Path) -> None:
    """Deletes a committed folder, which under its name is whole or not there at any moment.

    A crash leaves it under a staging name, for `sweep_staging`.
    """
    with disk_errors(folder):
        going = folder.with_name(f"{STAGING_PREFIX}{folder.name}-{secrets.token_hex(4)}")
        folder.rename(going)
        try:
            sync_folder(folder.parent)  # the disk must not lose files before it loses the name
        except OSError:
            going.rename(folder)
            raise
        shutil.rmtree(going)


def sweep_staging(folder: Path) -> None:
    """Removes what a crash left half-written directly in `folder`; the caller holds its lock."""
    with disk_errors(folder):
        for entry in list(folder.iterdir()):
            if entry.name.startswith(STAGING_PREFIX):
                shutil.rmtree(entry)
            elif entry.name.startswith(TEMPORARY_PREFIX):
                entry.unlink()


def sha256(path: Path, *, start: int = 0) -> str:
    """The SHA-256 of a file's bytes from `start` on, in hex."""
    with disk_errors(path), path.open("rb") as file:
        file.seek(start)
        return hashlib.file_digest(file, "sha256").hexdigest()


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
            sync_folder(path)
            continue
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        entry = FileEntry(size=path.stat().st_size, sha256=sha256(path))
        files[path.relative_to(staging).as_posix()] = asdict(entry)
    content = {"format": MANIFEST_FORMAT, "identity": dict(identity), "files": files}
    content["complete"] = True
    content[DIGEST] = _digest(content)
    with atomic_write(staging / MANIFEST) as file:
        file.write(json.dumps(content, indent=2, allow_nan=False).encode())


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest, in hex, without the field that holds it."""
    rest = {key: value for key, value in content.items() if key != DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        with disk_errors(path):
            content = json.loads(path.read_bytes())
        if content["format"] != MANIFEST_FORMAT or content["complete"] is not True:
            raise ValueError(f"format {content['format']!r}")
        if content.get(DIGEST, _digest(content)) != _digest(content):  # older ones have none
            raise ValueError("it is not what was written (SHA-256)")
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

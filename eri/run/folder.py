"""Where a verb writes: whether it may, and a run's folder made, locked, or a new one beside it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from eri.config import Config
from eri.errors import DiskError, OccupiedError
from eri.files import LOCK_FILE, disk_errors, lock, sweep_staging
from eri.printable import printable

__all__ = ["claim", "own", "refuse_existing"]


def claim(config: Config, restart: bool) -> Config:
    """Check that a run may write to its output folder; nothing is written.

    Args:
        config: the settings.
        restart: choose the first free name beside the output folder.

    Returns:
        The settings, with the new output folder after `restart`.

    Raises:
        DiskError: the folder cannot be made or written.
        OccupiedError: it holds something that is not a run.
    """
    folder = config.output
    if restart and folder.exists():
        names = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
        folder = next(name for name in names if not name.exists())
        config = config.model_copy(update={"output": folder})
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise DiskError("not a folder", where=printable(existing), hint="change output:")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise DiskError(
            "this folder may not be written", where=printable(existing), hint="change output:"
        )
    if folder.is_dir() and not (folder / LOCK_FILE).exists() and any(folder.iterdir()):
        raise OccupiedError(
            "the output folder holds files that are not of a run",
            where=printable(folder),
            hint="choose an empty folder with output:, or --restart for one beside it",
        )
    return config


@contextmanager
def own(folder: Path) -> Iterator[None]:
    """The run folder, made, locked and free of what a crash left half-written."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        for part in (folder, folder / "adapters", folder / "samples"):
            if part.is_dir():
                sweep_staging(part)
        yield


def refuse_existing(output: Path, overwrite: bool) -> None:
    """Refuse an output that exists, and make the folder that it will stand in.

    Raises:
        OccupiedError: it is a folder, or a file that may not be replaced.
        DiskError: its folder cannot be made.
    """
    if output.is_dir():
        raise OccupiedError(
            "a folder stands where the output would", where=printable(output), hint="choose a name"
        )
    if output.exists() and not overwrite:
        raise OccupiedError(
            "the output exists already",
            where=printable(output),
            hint="choose another name, or add --overwrite",
        )
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)

"""Where a verb writes: whether it may, and a run's folder made, locked, or a new one beside it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from itertools import count
from pathlib import Path

from eri.config import Config
from eri.errors import DiskError, OccupiedError
from eri.files import LOCK_FILE, disk_errors, lock, sweep_staging
from eri.printable import printable
from eri.run.stop import StopSignals

__all__ = ["claim", "hold", "own", "refuse_existing"]

TRIES = 3  # to lock a folder that another process, which failed early, deletes at that moment


@contextmanager
def hold(
    config: Config, *, restart: bool = False, dry_run: bool = False
) -> Iterator[tuple[Config, StopSignals]]:
    """A run's place, checked and locked, and the signals that stop it.

    Nothing slow is needed for this, so a second process on the same folder is refused at once.

    Args:
        config: the settings.
        restart: begin anew, in a new folder beside the old run.
        dry_run: make and lock nothing.

    Returns:
        The settings, with the new output folder after `restart`, and the signals.
    """
    with StopSignals() as stop, disk_errors(config.output):
        config = claim(config, restart)
        with nullcontext() if dry_run else own(config.output):
            yield config, stop


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
    if restart and os.path.lexists(folder):
        names = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
        folder = next(name for name in names if not os.path.lexists(name))
        config = config.model_copy(update={"output": folder})
    above = (folder, *folder.absolute().parents)
    existing = next(path for path in above if os.path.lexists(path))
    if not existing.is_dir():
        what = "not a folder" if existing.exists() else "a link that leads nowhere"
        raise DiskError(what, where=printable(existing), hint="change output:")
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
    """The run folder, made, locked and free of what a crash left half-written.

    What was made is deleted again if nothing was written into it.
    """
    with ExitStack() as held:
        made = _make_and_lock(folder, held)
        held.callback(_delete_unused, folder, made)
        for part in (folder, folder / "adapters", folder / "samples"):
            if part.is_dir():
                sweep_staging(part)
        yield


def _make_and_lock(folder: Path, held: ExitStack) -> list[Path]:
    """Lock a folder; returns those that had to be made for it, the deepest first."""
    tries = TRIES
    while True:
        tries -= 1
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock(folder))
        except DiskError as error:
            if not (tries and isinstance(error.__cause__, FileNotFoundError)):
                raise
        else:
            return missing


def _delete_unused(folder: Path, made: Sequence[Path]) -> None:
    """Delete the folders that were made if nothing but the lock is in them; it is still held."""
    with suppress(OSError):  # another process may write beside it, Windows keeps an open file
        if made and os.listdir(folder) == [LOCK_FILE]:
            (folder / LOCK_FILE).unlink()
            for path in made:
                path.rmdir()


def refuse_existing(output: Path, overwrite: bool) -> None:
    """Refuse an output that exists, and make the folder that it will stand in.

    Raises:
        OccupiedError: it is a folder, or a file that may not be replaced.
        DiskError: its folder cannot be made.
    """
    with disk_errors(output):
        if output.is_dir():
            raise OccupiedError(
                "a folder stands where the output would",
                where=printable(output),
                hint="choose a name",
            )
        if os.path.lexists(output) and not overwrite:
            raise OccupiedError(
                "the output exists already",
                where=printable(output),
                hint="choose another name, or add --overwrite",
            )
        output.parent.mkdir(parents=True, exist_ok=True)

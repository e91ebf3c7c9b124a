"""Every error that eri raises on purpose, and the exit code that each one ends the command with.

    EriError                 the root; carries what, where, hint and a list of problems
    ├── ConfigError      2   a config file, a setting or a command line that cannot be used
    ├── DataError        3   images or captions missing, empty or unreadable
    ├── ModelError       4   a base model, adapter or checkpoint missing or refused
    ├── DiskError        5   no space, no permission, not a folder
    ├── OccupiedError    6   the run folder is locked by another process, or the output exists
    ├── MemoryLimitError 7   the device or the host ran out of memory
    ├── WorkerError      8   a worker or a rank died or hung
    └── NonFiniteError   9   a NaN or an infinity where a number was needed
    Stopped        130/143   SIGINT or SIGTERM; no error, and no Exception, which foreign code eats

Anything else that leaves a command is a bug of ours: exit code 1, with a traceback.
"""

from collections.abc import Sequence
from typing import ClassVar

__all__ = [
    "ConfigError",
    "DataError",
    "DiskError",
    "EriError",
    "MemoryLimitError",
    "ModelError",
    "NonFiniteError",
    "OccupiedError",
    "Stopped",
    "WorkerError",
]


class EriError(Exception):
    """An error that the person in front of the terminal can mend.

    Args:
        what: what is wrong, with the value found and what is allowed; one line.
        where: the file, line, key or tensor that it is about.
        hint: one thing to do.
        problems: when several things of one kind are wrong, one line for each.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        hint: str | None = None,
        problems: Sequence[str] = (),
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.hint = hint
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return self.what if self.where is None else f"{self.what} ({self.where})"


class ConfigError(EriError):
    """A config file, a setting or a command line cannot be used."""

    exit_code = 2


class DataError(EriError):
    """Images or captions are missing, empty or unreadable."""

    exit_code = 3


class ModelError(EriError):
    """A base model, an adapter or a checkpoint is missing or refused."""

    exit_code = 4


class DiskError(EriError):
    """The disk is full, or a path may not be written."""

    exit_code = 5


class OccupiedError(EriError):
    """Another process holds the run folder, or an output exists already."""

    exit_code = 6


class MemoryLimitError(EriError):
    """The device or the host ran out of memory."""

    exit_code = 7


class WorkerError(EriError):
    """A worker or a rank died or hung."""

    exit_code = 8


class NonFiniteError(EriError):
    """A loss, a gradient, a latent or a weight is NaN or infinite."""

    exit_code = 9


class Stopped(BaseException):
    """The work was asked to stop (SIGINT or SIGTERM); a run that was asked once has saved.

    As `KeyboardInterrupt` it is no `Exception`: it may be raised inside foreign code, whose
    `except Exception` would take it for a file that cannot be read.

    Args:
        signal_number: the signal that asked; the exit code is 128 plus it.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.exit_code = 128 + signal_number

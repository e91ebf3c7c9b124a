"""SIGINT and SIGTERM: the first asks a run to finish its step and save, the second ends it now."""

import os
import signal
from contextlib import suppress
from types import FrameType, TracebackType
from typing import NoReturn, Self

from eri.errors import Stopped

__all__ = ["StopSignals", "leave_on_signals"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def leave_on_signals() -> None:
    """From now on a signal ends the process at once: there is nothing to save or to clean up."""
    for number in SIGNALS:
        signal.signal(number, _leave)


class StopSignals:
    """Remembers a signal that asks to stop; a context manager around the work that may be stopped.

    A second signal raises `Stopped` wherever the work is: what is half-written is cleaned up on
    the way out, and what was saved before stays. It may come out of foreign code as some other
    error, which ends here. A third one ends the process at once, with the same exit code.

    Args:
        remembered: signals that are only remembered; with 0 the first one raises.
    """

    def __init__(self, remembered: int = 1) -> None:
        self.number: int | None = None
        """The first signal, if there was one."""
        self._remembered = remembered
        self._count = 0

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._count > self._remembered and not isinstance(error, Stopped):
            self.raise_if_stopped(error)

    def __call__(self) -> bool:
        """Whether the work was asked to stop."""
        return self.number is not None

    def raise_if_stopped(self, cause: BaseException | None = None) -> None:
        """Raise `Stopped` if the work was asked to stop."""
        if self.number is not None:
            raise Stopped(self.number) from cause

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        self.number = number if self.number is None else self.number
        if self._count > self._remembered + 1:
            _leave(self.number, frame)
        if self._count > self._remembered:
            raise Stopped(self.number)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    with suppress(OSError):
        os.write(2, b"eri: stopped\n")  # not `print`, which this may have interrupted
    os._exit(128 + number)

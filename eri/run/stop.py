"""SIGINT and SIGTERM: the first asks a run to finish its step and save, the second ends it now."""

import signal
from types import FrameType, TracebackType
from typing import Self

from eri.errors import Stopped

__all__ = ["StopSignals"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Remembers a signal that asks to stop; a context manager around the work that may be stopped.

    A second signal raises `Stopped` wherever the work is: what is half-written is cleaned up on
    the way out, and what was saved before stays.
    """

    def __init__(self) -> None:
        self.number: int | None = None

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

    def __call__(self) -> bool:
        """Whether the work was asked to stop."""
        return self.number is not None

    def raise_if_stopped(self) -> None:
        """Raise `Stopped` if the work was asked to stop."""
        if self.number is not None:
            raise Stopped(self.number)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise Stopped(number)
        self.number = number

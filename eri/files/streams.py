"""Standard output and error that never end the work: who reads them may go, their disk may fill."""

import io
import os
import select
import sys
from typing import Any, TextIO

__all__ = ["Outlet", "open_standard_streams"]


class Outlet(io.FileIO):
    """What a process writes to; what cannot be written is lost, and `lost` says why."""

    lost: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write bytes, or lose them."""
        try:
            return self._write(data)
        except OSError as error:
            self.lost = error
            return len(data)

    def _write(self, data: Any) -> int:
        while (written := super().write(data)) is None:  # a pipe that does not wait is full
            select.select([], [self], [])
        return written


def open_standard_streams() -> tuple[Outlet, Outlet]:
    """Make standard output and error such outlets for `print` and everything above it.

    Those that were closed lead nowhere: else the next file that is opened would get their number,
    and with it what a library prints.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    outlets = Outlet(1, "w", closefd=False), Outlet(2, "w", closefd=False)
    sys.stdout, sys.stderr = _text(outlets[0], sys.stdout), _text(outlets[1], sys.stderr)
    return outlets


def _text(outlet: Outlet, before: TextIO | None) -> TextIO:
    """A stream of text in the encoding of the one before; what that lacks is escaped."""
    encoding = "utf-8" if before is None else before.encoding
    buffered = io.BufferedWriter(outlet)
    return io.TextIOWrapper(buffered, encoding, errors="backslashreplace", line_buffering=True)

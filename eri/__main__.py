"""`python -m eri` is the command `eri`."""

import os
import signal
from types import FrameType
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """The command, which a signal ends quietly from its first moment on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    from eri.cli import main as run  # takes a while; it has better handlers

    run()


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"eri: stopped\n")
    os._exit(128 + number)


if __name__ == "__main__":
    main()

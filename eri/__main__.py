"""`python -m eri` is the command `eri`."""

from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """The command, which a signal ends quietly from its first moment on."""
    from eri.run.stop import leave_on_signals

    leave_on_signals()
    from eri.cli import main as run

    run()


if __name__ == "__main__":
    main()

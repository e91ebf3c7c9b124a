"""The command line in the test's own process: quick; only its streams and signals are left out."""

import sys
from types import SimpleNamespace

import pytest

from eri import cli
from eri.run import stop

__all__ = ["eri"]


def eri(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command; what it says is for `capsys`.

    Returns:
        The exit code; 1 after a bug, whose traceback is printed as Python would have it printed.
    """
    heard = SimpleNamespace(lost=None)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["eri", *map(str, arguments)])
        patch.setattr(sys, "excepthook", sys.excepthook)
        patch.setattr(stop, "leave_on_signals", lambda: None)
        patch.setattr(cli, "open_standard_streams", lambda: (heard, heard))
        patch.setattr(cli, "set_environment", lambda: None)
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a bug
            sys.excepthook(type(error), error, error.__traceback__)
            return 1

import os
import signal

import pytest

from eri.errors import Stopped
from eri.run.stop import StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_remembered_and_the_second_ends_the_work(number: int) -> None:
    with StopSignals() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        with pytest.raises(Stopped) as stopped:
            stop.raise_if_stopped()
        assert stopped.value.exit_code == 128 + number
        with pytest.raises(Stopped):
            os.kill(os.getpid(), number)
            signal.sigtimedwait([], 1)  # the handler runs at the latest here


def test_the_handlers_from_before_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before

import os
import signal
from collections.abc import Iterator

import pytest

from eri.errors import Stopped
from eri.run.stop import SIGNALS, StopSignals, leave_on_signals


@pytest.fixture(autouse=True)
def handlers_come_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    signal.sigtimedwait([], 1)  # the handler runs at the latest here


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving at once raises SystemExit, for a test to survive it."""

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_remembered_and_the_second_ends_the_work(number: int) -> None:
    with pytest.raises(Stopped) as stopped, StopSignals() as stop:
        assert not stop()
        send(number)
        assert stop()
        with pytest.raises(Stopped):
            stop.raise_if_stopped()
        send(number)
        pytest.fail("the work went on")
    assert stopped.value.exit_code == 128 + number


def test_no_foreign_except_keeps_the_second_signal() -> None:
    eaten = []
    with pytest.raises(Stopped), StopSignals():
        send(signal.SIGINT)
        try:
            send(signal.SIGINT)
        except Exception as error:  # noqa: BLE001 - as decoders and loaders do
            eaten.append(error)
    assert not eaten


def test_what_foreign_code_makes_of_the_second_signal_is_still_a_stop() -> None:
    with pytest.raises(Stopped) as stopped, StopSignals():
        send(signal.SIGTERM)
        try:
            send(signal.SIGTERM)
        except Stopped as error:
            raise ValueError("could not determine the shape of this object") from error
    assert isinstance(stopped.value.__cause__, ValueError)
    with pytest.raises(Stopped), StopSignals():
        send(signal.SIGTERM)
        with pytest.raises(Stopped):  # swallowed, as by a destructor
            send(signal.SIGTERM)


def test_an_error_after_one_signal_is_that_error() -> None:
    with pytest.raises(ValueError, match="disk"), StopSignals():
        send(signal.SIGTERM)
        raise ValueError("disk")


@pytest.mark.usefixtures("left")
def test_the_third_signal_leaves_at_once_with_the_code_of_the_first(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(Stopped), StopSignals():
        send(signal.SIGTERM)
        with pytest.raises(Stopped):
            send(signal.SIGINT)
        with pytest.raises(SystemExit) as left:
            send(signal.SIGINT)
        assert left.value.code == 143
    assert capfd.readouterr().err == "eri: stopped\n"


@pytest.mark.usefixtures("left")
def test_where_nothing_is_remembered_the_first_signal_ends_the_work() -> None:
    leave_on_signals()
    with pytest.raises(SystemExit, match="130"):
        send(signal.SIGINT)
    with pytest.raises(Stopped), StopSignals(remembered=0):
        send(signal.SIGINT)
    with pytest.raises(SystemExit, match="143"):
        send(signal.SIGTERM)


def test_the_handlers_from_before_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before

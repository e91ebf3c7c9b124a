import pytest

from eri.run import clock
from eri.run.clock import Clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [100.0]
    monkeypatch.setattr(clock, "perf_counter", lambda: time[0])
    return time


def test_nested_work_counts_for_the_innermost_alone(now: list[float]) -> None:
    watch = Clock()
    now[0] += 1
    with watch("training"):
        now[0] += 10
        with watch("previews"):
            now[0] += 4
        now[0] += 2
        with watch("saving"):
            now[0] += 0.01  # too little to tell
    watch.move(3, "training", "recording")
    expected = "17.0 s: starting 1.0 s, training 9.0 s, previews 4.0 s, recording 3.0 s"
    assert watch.told() == expected


def test_what_fails_is_counted_and_left(now: list[float]) -> None:
    watch = Clock()
    with pytest.raises(KeyError), watch("loading"):
        now[0] += 2
        raise KeyError
    now[0] += 1
    assert watch.told() == "3.0 s: starting 1.0 s, loading 2.0 s"

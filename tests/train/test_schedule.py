import pytest

from eri.train import learning_rate


def rates(schedule: str, steps: int = 10, warmup: int = 0) -> list[float]:
    return [
        learning_rate(1.0, schedule, step=step, steps=steps, warmup=warmup) for step in range(steps)
    ]


def test_constant_is_constant() -> None:
    assert rates("constant") == [1.0] * 10


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decays_start_at_the_peak_fall_and_never_reach_zero_within_the_run(schedule: str) -> None:
    values = rates(schedule)
    assert values[0] == 1.0
    assert values == sorted(values, reverse=True)
    assert 0 < values[-1] < 0.11


def test_warmup_rises_from_above_zero_to_the_peak() -> None:
    assert rates("constant", warmup=3)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_warmup_as_long_as_the_run_is_safe() -> None:
    assert rates("cosine", steps=4, warmup=4) == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_after_the_end_the_rate_stays_at_the_end() -> None:
    assert learning_rate(1.0, "linear", step=50, steps=10, warmup=0) == 0.0


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="rex"):
        learning_rate(1.0, "rex", step=0, steps=1, warmup=0)

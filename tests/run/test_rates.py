from datetime import date
from pathlib import Path

import pytest
import torch

from eri.run.rates import device_name, known_rate, remember_rate
from eri.run.remembered import MOST_KEPT


def test_what_was_measured_is_known_afterwards() -> None:
    assert known_rate("a run") is None
    remember_rate("a run", 15.7)
    remember_rate("another", 3)
    found = known_rate("a run")
    assert found is not None
    assert (found.images_per_second, found.measured) == (15.7, date.today())
    remember_rate("a run", 16.5)
    assert getattr(known_rate("a run"), "images_per_second", None) == 16.5
    assert known_rate("a slower run") is None


def test_a_run_too_short_to_tell_changes_nothing(isolated_cache: Path) -> None:
    remember_rate("a run", None)
    assert not (isolated_cache / "rates.json").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"a run": 3}',
        b'{"a run": ["fast", "2026-01-01"]}',
        b'{"a run": [3, "someday"]}',
        b'{"a run": [-1, "2026-01-01"]}',
        b'{"a run": [NaN, "2026-01-01"]}',
        b" " * 1_000_001,
    ],
    ids=range(11),
)
def test_a_damaged_file_is_as_none(isolated_cache: Path, content: bytes) -> None:
    (isolated_cache / "rates.json").write_bytes(content)
    assert known_rate("a run") is None
    remember_rate("a run", 2.0)
    assert getattr(known_rate("a run"), "images_per_second", None) == 2.0


def test_the_file_stays_small_and_keeps_the_latest() -> None:
    for number in range(3):
        remember_rate(f"run {number}", 1.0)
    remember_rate("run 0", 1.0)
    for number in range(MOST_KEPT - 1):
        remember_rate(f"other {number}", 1.0)
    assert known_rate("run 0") and not known_rate("run 1") and not known_rate("run 2")


def test_a_cache_that_fails_is_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ERI_CACHE", str(tmp_path / "file"))
    remember_rate("a run", 1.0)
    assert known_rate("a run") is None


def test_a_device_is_named_by_what_makes_it_fast() -> None:
    assert f"{torch.get_num_threads()} threads" in device_name(torch.device("cpu"))

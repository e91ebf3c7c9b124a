from pathlib import Path

import pytest

from eri.run.remembered import MOST_KEPT, recall, remember


def test_kinds_do_not_mix_and_the_latest_counts(isolated_cache: Path) -> None:
    remember("colours", "sky", [1, 2])
    remember("colours", "sky", [3])
    remember("sizes", "sky", 7)
    assert (recall("colours", "sky"), recall("sizes", "sky")) == ([3], 7)
    assert recall("colours", "sea") is None
    assert recall("tastes", "sky") is None
    assert (isolated_cache / "colours.json").is_file()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b" " * 1_000_001])
def test_a_damaged_file_is_as_none(isolated_cache: Path, content: bytes) -> None:
    (isolated_cache / "colours.json").write_bytes(content)
    assert recall("colours", "sky") is None
    remember("colours", "sky", 2)
    assert recall("colours", "sky") == 2


def test_the_file_stays_small(isolated_cache: Path) -> None:
    for number in range(MOST_KEPT + 1):
        remember("colours", str(number), number)
    assert recall("colours", "0") is None
    assert recall("colours", "1") == 1


def test_a_cache_that_fails_is_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ERI_CACHE", str(tmp_path / "file"))
    remember("colours", "sky", 1)
    assert recall("colours", "sky") is None

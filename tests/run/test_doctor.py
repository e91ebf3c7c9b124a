import pytest

from eri.run import doctor as module
from eri.run.doctor import doctor


def test_it_describes_the_machine() -> None:
    facts, _ = doctor()
    text = "\n".join(facts)
    assert "torch 2." in text
    assert "GPU: " in text
    assert "cache: " in text


def test_problems_come_with_their_mend(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(module, "unusable_card", lambda: ("a card is hidden", "unhide it"))
    blocked = tmp_path_factory.mktemp("blocked") / "file"
    blocked.touch()
    monkeypatch.setenv("ERI_CACHE", str(blocked))
    _, problems = doctor()
    assert problems[0] == "a card is hidden\n  mend: unhide it"
    assert problems[1].startswith("cache: ")

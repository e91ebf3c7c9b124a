"""Odd places to write to: refused, or used as they are; nothing beside them changes."""

import hashlib
import os
from pathlib import Path

import pytest

from tests.torture.here import eri

LONG = "x" * 300


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder: kinds, links and contents."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"-> {path.readlink()}"
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path)] = "other"
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with things in it and beside it that are not to be touched."""
    here = tmp_path / "here"
    for folder in (here / "photos", here / "thesis", tmp_path / "beside"):
        folder.mkdir(parents=True)
        (folder / "precious").write_text("years of work")
    (here / "file").write_text("one of them")
    (here / "to-nothing").symlink_to(tmp_path / "nothing")
    (here / "to-file").symlink_to(here / "file")
    (here / "to-beside").symlink_to(tmp_path / "beside")
    (here / "loop").symlink_to("loop")
    (here / "run").mkdir()
    (here / "run" / "run.lock").symlink_to(tmp_path / "beside" / "precious")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return here


OUTPUTS = {
    # no model is there, so 4 means that the place was free; nothing of it may be left
    "..": 2,
    "../new": 4,
    "../beside": 6,
    "{here}/new/deep": 4,
    "~": 2,
    "new/../..": 2,
    "-rf": 2,
    LONG: 2,
    f"{'y/' * 3}{LONG}": 2,
    "file": 5,
    "file/below": 5,
    "to-nothing": 5,
    "to-nothing/below": 5,
    "to-file": 5,
    "to-beside": 6,
    "loop": 5,
    "thesis": 6,
    "photos": 6,
    "run": 5,
    "CON": 2,
    "a:b": 2,
    "a\nb": 2,
    "/dev/null": 5,
}


@pytest.mark.parametrize(("output", "code"), OUTPUTS.items(), ids=lambda value: str(value)[:20])
def test_a_run_goes_into_no_odd_place(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    output: str,
    code: int,
) -> None:
    before = tree(place.parent)
    command = ("train", "--model", "./none", "--data", "photos", "--output")
    found = eri(*command, output.format(here=place), monkeypatch=monkeypatch)
    err = capsys.readouterr().err
    assert found == code, err
    assert err.startswith("eri: error: ") and "\nhint: " in err
    assert tree(place.parent) == before


FILES = {
    "file": 6,
    "to-file": 6,
    "to-nothing": 6,
    "thesis": 6,
    "to-beside": 6,
    "file/below": 5,
    "loop": 6,
    LONG: 5,
    "/dev/null": 6,
}


@pytest.mark.parametrize(("output", "code"), FILES.items(), ids=lambda value: str(value)[:20])
def test_a_file_is_written_over_nothing(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    output: str,
    code: int,
) -> None:
    before = tree(place.parent)
    found = eri("init", "photos", "-o", output, monkeypatch=monkeypatch)
    err = capsys.readouterr().err
    assert found == code, err
    assert tree(place.parent) == before


def test_a_file_that_may_be_replaced_is_and_what_a_link_leads_to_is_not(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("to-file", "to-nothing"):
        assert eri("init", "photos", "-o", name, "--overwrite", monkeypatch=monkeypatch) == 0
        assert not (place / name).is_symlink()
    assert (place / "file").read_text() == "one of them"
    assert not (place.parent / "nothing").exists()


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root makes such a folder")
def test_a_cache_of_somebody_else_is_refused(
    place: Path, sd15: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = place / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    os.chown(cache, 12345, 12345)
    monkeypatch.setenv("ERI_CACHE", str(cache))
    command = ("sample", sd15, "-p", "x", "-o", "a.png", "--steps", "1")
    code = eri(*command, monkeypatch=monkeypatch)
    assert code in {0, 5}, capsys.readouterr().err
    assert not list(cache.iterdir())

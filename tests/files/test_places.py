import os
from pathlib import Path

import pytest

from eri.errors import DiskError, ModelError
from eri.files import (
    cache_dir,
    contained,
    require_space,
    run_name,
)
from tests.files.conftest import mode_of


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("ERI_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.setenv("ERI_CACHE", "")
    assert cache_dir() == tmp_path / "xdg" / "eri"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == tmp_path / "home" / ".cache" / "eri"


def test_the_cache_is_for_its_owner_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERI_CACHE", str(tmp_path / "new"))
    assert mode_of(cache_dir()) == 0o700
    (tmp_path / "new").chmod(0o777)
    assert mode_of(cache_dir()) == 0o700


def test_a_cache_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERI_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(DiskError, match="another user"):
        cache_dir()


def test_a_cache_path_that_is_a_file_is_a_disk_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("ERI_CACHE", str(tmp_path / "file"))
    with pytest.raises(DiskError):
        cache_dir()


def test_space_is_checked_before_anything_begins(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(DiskError, match="are needed and"):
        require_space(tmp_path, 1 << 60)


@pytest.mark.parametrize("name", ["a.bin", "a/b.bin", "a/../b.bin", "..a"])
def test_a_name_below_the_folder_is_taken(tmp_path: Path, name: str) -> None:
    assert contained(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/../../b", "link/a", "a\0b", "\ud800"])
def test_a_name_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    with pytest.raises(ModelError, match="leads out"):
        contained(tmp_path / "root", name)


def test_a_link_may_lead_into_a_folder_that_is_named(tmp_path: Path) -> None:
    root, blobs = tmp_path / "root", tmp_path / "blobs"
    for folder in (root, blobs, tmp_path / "blobs-too"):
        folder.mkdir()
    (root / "good").symlink_to(blobs / "x")
    (root / "bad").symlink_to(tmp_path / "blobs-too" / "x")
    assert contained(root, "good", links_into=[blobs]) == root / "good"
    for name in ("bad", "../blobs/x", str(blobs / "x")):
        with pytest.raises(ModelError, match="leads out of its folder"):
            contained(root, name, links_into=[blobs])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("my-lora_1.5", "my-lora_1.5"),
        ("photos of Jürgen", "photos-of-J-rgen-b6e2e6"),
        ("../../etc", "etc"),
        ("-rf", "rf"),
        ("a:b\n\x1b", "a-b"),
        ("日本", "run-cf2abf"),
        ("犬", "run-1e82f9"),
        ("", "run"),
        ("\ud800", "run-91a681"),
        ("..", "run"),
        ("CON", "run-CON"),
        ("nul.txt", "run-nul.txt"),
        ("x" * 300, "x" * 100),
        ("trailing.", "trailing"),
    ],
)
def test_a_run_name_suits_every_file_system(text: str, name: str) -> None:
    assert run_name(text) == name

import errno
import json
import os
from pathlib import Path

import pytest

from eri.errors import DiskError, ModelError, OccupiedError
from eri.files import (
    commit_folder,
    sha256,
    sweep_staging,
    verify_folder,
)
from tests.files.conftest import mode_of


def committed(parent: Path, name: str = "checkpoint-000010") -> Path:
    with commit_folder(parent / name, identity={"step": 10}) as staging:
        (staging / "adapter.bin").write_bytes(b"adapter" * 100)
        (staging / "state").mkdir()
        (staging / "state" / "optimizer.bin").write_bytes(b"moments" * 100)
    return parent / name


def test_a_committed_folder_verifies_and_says_what_it_is(tmp_path: Path) -> None:
    folder = committed(tmp_path)
    manifest = verify_folder(folder)
    assert manifest.identity == {"step": 10}
    assert set(manifest.files) == {"adapter.bin", "state/optimizer.bin"}
    assert manifest.files["adapter.bin"].size == 700
    assert manifest.files["adapter.bin"].sha256 == sha256(folder / "adapter.bin")
    assert os.listdir(tmp_path) == [folder.name]


def test_the_folder_is_private_until_it_is_committed(tmp_path: Path, umask: int) -> None:
    with commit_folder(tmp_path / "done", identity={}) as staging:
        assert mode_of(staging) == 0o700
        assert not (tmp_path / "done").exists()
    assert mode_of(tmp_path / "done") == 0o777 & ~umask
    assert mode_of(tmp_path / "done" / "manifest.json") == 0o666 & ~umask


def test_the_manifest_is_written_after_every_file_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def noted_fsync(descriptor: int) -> None:
        order.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def noted_replace(path: Path, target: Path) -> Path:
        order.append(f"rename to {target.name}")
        return replace(path, target)

    def noted_rename(path: Path, target: Path) -> Path:
        order.append(f"rename to {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    monkeypatch.setattr(Path, "rename", noted_rename)
    committed(tmp_path)
    manifest = order.index("rename to manifest.json")
    commit = order.index("rename to checkpoint-000010")
    assert set(order[:manifest]) >= {"flush adapter.bin", "flush optimizer.bin", "flush state"}
    assert order[manifest + 1].startswith("flush .staging-")
    assert commit == manifest + 2
    assert order[commit + 1 :] == [f"flush {tmp_path.name}"]


def test_a_failed_commit_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(DiskError, match="disk is full"),
        commit_folder(tmp_path / "done", identity={}) as staging,
    ):
        (staging / "a").write_bytes(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("empty", [True, False])
def test_an_existing_name_is_never_touched(tmp_path: Path, empty: bool) -> None:
    folder = tmp_path / "done"
    folder.mkdir()
    if not empty:
        (folder / "a").write_bytes(b"old")
    with pytest.raises(OccupiedError), commit_folder(folder, identity={}):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == ["done"]


def test_a_name_taken_during_the_work_is_never_touched(tmp_path: Path) -> None:
    with pytest.raises(OccupiedError), commit_folder(tmp_path / "done", identity={}):
        (tmp_path / "done").mkdir()
    assert os.listdir(tmp_path) == ["done"]
    assert os.listdir(tmp_path / "done") == []


def flip(content: bytes) -> bytes:
    return content[:50] + bytes([content[50] ^ 1]) + content[51:]


DAMAGE = {
    "one bit": flip,
    "zero tail": lambda content: content[:-20] + bytes(20),
    "all zeros": lambda content: bytes(len(content)),
    "cut": lambda content: content[:-1],
    "empty": lambda content: b"",
    "longer": lambda content: content + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["adapter.bin", "state/optimizer.bin"])
def test_every_damage_to_a_file_is_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    folder = committed(tmp_path)
    (folder / name).write_bytes(DAMAGE[damage]((folder / name).read_bytes()))
    with pytest.raises(ModelError) as caught:
        verify_folder(folder)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [name]


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    folder = committed(tmp_path)
    (folder / "adapter.bin").unlink()
    with pytest.raises(ModelError) as caught:
        verify_folder(folder)
    assert caught.value.problems == ("adapter.bin: the file is missing",)


def entry(name: str) -> bytes:
    listed = {name: {"size": 0, "sha256": "0"}}
    content = {"format": 1, "identity": {}, "files": listed, "complete": True}
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": 2}',
        b'{"format": 1, "identity": {}, "files": {}}',
        b'{"format": 1, "identity": {}, "files": {}, "complete": false}',
        b'{"format": 1, "identity": {}, "files": {"a": 3}, "complete": true}',
        b'{"format": 1, "identity": {}, "files": {"a": {}}, "complete": true}',
        b'{"format": 1, "identity": {}, "files": [], "complete": true}',
        entry("../outside"),
        entry("/etc/hostname"),
        entry("a\0b"),
        entry("\ud800"),
        entry("x" * 5000),
        entry("\x1b[2J"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = committed(tmp_path)
    (tmp_path / "outside").write_bytes(b"")
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ModelError) as caught:
        verify_folder(folder)
    said = "\n".join([str(caught.value), *caught.value.problems])
    assert said.replace("\n", "").isprintable()


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"manifest\.json"):
        verify_folder(tmp_path)


def test_sweeping_removes_debris_and_nothing_else(tmp_path: Path) -> None:
    folder = committed(tmp_path)
    (tmp_path / ".staging-x-1").mkdir()
    (tmp_path / ".staging-x-1" / "half").write_bytes(b"x")
    (tmp_path / ".writing-1").write_bytes(b"x")
    (tmp_path / "notes.txt").write_bytes(b"x")
    sweep_staging(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [folder.name, "notes.txt"]

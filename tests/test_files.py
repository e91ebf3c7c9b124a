import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eri import files
from eri.errors import DiskError, ModelError, OccupiedError
from eri.files import (
    atomic_write,
    cache_dir,
    commit_folder,
    contained,
    disk_errors,
    lock,
    require_space,
    run_name,
    sha256,
    sweep_staging,
    verify_folder,
)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o002, 0o077])
def umask(request: pytest.FixtureRequest):
    previous = os.umask(request.param)
    yield request.param
    os.umask(previous)


# atomic_write


def test_a_file_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_the_mode_follows_the_umask(tmp_path: Path, umask: int) -> None:
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"x")
    assert mode_of(tmp_path / "a.bin") == 0o666 & ~umask


def test_a_link_is_replaced_and_its_target_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_bytes(b"precious")
    (tmp_path / "link").symlink_to(target)
    with atomic_write(tmp_path / "link") as file:
        file.write(b"new")
    assert target.read_bytes() == b"precious"
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("durable", [True, False])
def test_the_order_is_flush_rename_flush_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def noted_replace(path: Path, target: Path) -> Path:
        order.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    with atomic_write(tmp_path / "a", durable=durable) as file:
        file.write(b"x")
    assert order == (["file", "rename", "folder"] if durable else ["rename"])
    assert (tmp_path / "a").read_bytes() == b"x"


@pytest.mark.parametrize("name", ["no-such-folder/a", "file/a", "folder", "x" * 300])
def test_a_path_that_cannot_be_written_is_a_disk_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(DiskError) as caught, atomic_write(tmp_path / name) as file:
        file.write(b"x")
    assert caught.value.where is not None
    assert caught.value.hint is not None
    assert sorted(os.listdir(tmp_path)) == before


FILE_SIZE_LIMIT = """
import resource, sys
from pathlib import Path
from eri.errors import DiskError
from eri.files import atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    with atomic_write(Path(sys.argv[1])) as file:
        file.write(bytes(1 << 20))
except DiskError as error:
    print(error.what)
"""


def test_a_write_that_the_system_stops_half_way_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    done = run_python(FILE_SIZE_LIMIT, path)
    assert done.communicate()[0].strip() == "the file would be larger than the limit on file sizes"
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


WRITE_FOREVER = """
import sys
from pathlib import Path
from eri.files import atomic_write
print("ready", flush=True)
number = 0
while True:
    number = (number + 1) % 256
    with atomic_write(Path(sys.argv[1])) as file:
        for _ in range(64):
            file.write(bytes([number]) * 4096)
"""


def run_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for attempt in range(4):
        process = run_python(WRITE_FOREVER, path)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.05 + 0.013 * attempt)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        content = path.read_bytes()
        assert content == content[:1] * (64 * 4096)
    sweep_staging(tmp_path)
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permission"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "read or write error"),
    ],
)
def test_the_reason_of_the_system_is_said_in_words(number: int, words: str) -> None:
    with pytest.raises(DiskError, match=words) as caught, disk_errors(Path("out\x1b")):
        raise OSError(number, os.strerror(number))
    assert caught.value.where == "out\\x1b"
    assert caught.value.hint is not None


# commit_folder and verify_folder


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


# lock

HOLD = """
import sys
from pathlib import Path
from eri.files import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_holder_is_refused_and_told_who_holds(tmp_path: Path) -> None:
    with lock(tmp_path):
        with (
            pytest.raises(OccupiedError, match=f"process {os.getpid()} on .* since 20"),
            lock(tmp_path),
        ):
            pytest.fail("the block must not run")
    with lock(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(OccupiedError, match=f"process {process.pid} "), lock(tmp_path):
            pytest.fail("the block must not run")
        process.kill()
        process.wait()
    with lock(tmp_path):
        pass


def test_the_text_of_a_lock_file_is_printed_escaped(tmp_path: Path) -> None:
    with lock(tmp_path):
        (tmp_path / "run.lock").write_bytes(b"\x1b[2J\xff")
        with pytest.raises(OccupiedError) as caught, lock(tmp_path):
            pytest.fail("the block must not run")
    assert caught.value.what.isprintable()


def test_a_file_system_without_locks_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "_lock_without_waiting", no_locks)
    with pytest.raises(DiskError, match="cannot lock"), lock(tmp_path):
        pytest.fail("the block must not run")


# cache_dir


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


# space, names


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
        ("photos of Jürgen", "photos-of-J-rgen"),
        ("../../etc", "etc"),
        ("-rf", "rf"),
        ("a:b\n\x1b", "a-b"),
        ("日本", "run"),
        ("", "run"),
        ("..", "run"),
        ("CON", "run-CON"),
        ("nul.txt", "run-nul.txt"),
        ("x" * 300, "x" * 100),
        ("trailing.", "trailing"),
    ],
)
def test_a_run_name_suits_every_file_system(text: str, name: str) -> None:
    assert run_name(text) == name

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eri.errors import DiskError
from eri.files import (
    atomic_write,
    sweep_staging,
)
from tests.files.conftest import mode_of


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

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from eri.errors import DiskError, OccupiedError
from eri.files import lock, locks

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

    monkeypatch.setattr(locks, "_lock_without_waiting", no_locks)
    with pytest.raises(DiskError, match="cannot lock"), lock(tmp_path):
        pytest.fail("the block must not run")


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("link", "the lock file is a link"),
        ("link to nothing", "the lock file is a link"),
        ("hard link", "the lock file is a hard link"),
        ("pipe", "the lock file is no plain file"),
        ("folder", "this is a folder"),
    ],
)
def test_a_lock_file_that_is_something_else_is_refused_and_not_touched(
    tmp_path: Path, kind: str, named: str
) -> None:
    precious, path = tmp_path / "precious", tmp_path / "run" / "run.lock"
    path.parent.mkdir()
    precious.write_text("years of work")
    make: dict[str, Callable[[], object]] = {
        "link": lambda: path.symlink_to(precious),
        "link to nothing": lambda: path.symlink_to(tmp_path / "nothing"),
        "hard link": lambda: path.hardlink_to(precious),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
    }
    make[kind]()
    with pytest.raises(DiskError, match=named), lock(path.parent):
        pytest.fail("the block must not run")
    assert precious.read_text() == "years of work"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["precious", "run"]


def test_a_lock_on_a_file_that_was_deleted_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, attempts = tmp_path / "run.lock", []
    take = locks._lock_without_waiting

    def deleted_first(descriptor: int) -> None:
        if not attempts:
            path.unlink()
        attempts.append(descriptor)
        take(descriptor)

    monkeypatch.setattr(locks, "_lock_without_waiting", deleted_first)
    with lock(tmp_path):
        assert len(attempts) == 2
        assert path.read_text().startswith(f"process {os.getpid()} ")
        with pytest.raises(OccupiedError), lock(tmp_path):
            pytest.fail("the block must not run")


def test_a_folder_that_is_gone_has_no_lock(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="no such file"), lock(tmp_path / "gone"):
        pytest.fail("the block must not run")

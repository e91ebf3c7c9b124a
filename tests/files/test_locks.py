import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eri.errors import DiskError, OccupiedError
from eri.files import (
    lock,
    locks,
)

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

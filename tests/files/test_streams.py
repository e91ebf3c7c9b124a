import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eri.files import Outlet

OPEN = """
import os, sys
from eri.files import open_standard_streams
output, _ = open_standard_streams()
for line in range(3):
    print("line", line, "…", flush=True)
print("opened as", os.open(os.devnull, os.O_RDONLY), file=sys.stderr)
print(type(output.lost).__name__, file=sys.stderr)
"""


def outcome(**streams: object) -> subprocess.CompletedProcess[str]:
    """What a Python says that prints to such streams."""
    command = [sys.executable, "-c", OPEN]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.run(command, text=True, **settings)  # type: ignore[call-overload]


def test_what_can_be_written_is() -> None:
    done = outcome()
    assert done.stdout.splitlines() == [f"line {line} …" for line in range(3)]
    assert done.stderr.splitlines()[1] == "NoneType"


def test_an_encoding_that_lacks_a_character_gets_its_number() -> None:
    done = outcome(env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.stdout.splitlines()[0] == r"line 0 \u2026"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_loses_what_is_said_and_nothing_else() -> None:
    with Path("/dev/full").open("wb") as full:
        done = outcome(stdout=full)
        assert done.returncode == 0
        assert done.stderr.splitlines()[1] == "OSError"
        assert outcome(stdout=full, stderr=full).returncode == 0


def test_a_reader_that_left_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = outcome(stdout=write)
    os.close(write)
    assert done.returncode == 0
    assert done.stderr.splitlines()[1] == "BrokenPipeError"


def test_a_stream_that_was_closed_is_not_the_next_file_that_is_opened() -> None:
    done = outcome(stdout=None, preexec_fn=lambda: (os.close(0), os.close(1)))
    assert done.returncode == 0
    assert int(done.stderr.splitlines()[0].split()[-1]) > 2


def test_a_pipe_that_does_not_wait_is_waited_for() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    size = 1 << 20  # many times what a pipe holds
    counter = subprocess.Popen(["wc", "-c"], stdin=read, stdout=subprocess.PIPE)
    os.close(read)
    with io.BufferedWriter(Outlet(write, "w")) as file:
        file.write(b"x" * size)
    assert int(counter.communicate(timeout=60)[0]) == size

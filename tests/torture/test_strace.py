"""The order in which a save reaches the disk, as the system was asked for it."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CALL = re.compile(r"^(?:\d+ +)?(\w+)\((.*)\) += (-?\d+)")
OPENED = re.compile(r"^\d+<(.*)>")
NAMES = re.compile(r'"((?:[^"\\]|\\.)*)"')
SAVE = """
import sys
from pathlib import Path
from eri.run.saves import Saves
from tests.torture.victims import layers, small_state
state, adapter = small_state()
saves = Saves(folder=Path(sys.argv[1]), keep=1, layers=layers(), made_with={}, say=print)
for state.step in (1, 2):
    saves.save(state, adapter, identity={}, metadata={})
"""


@dataclass(frozen=True)
class Call:
    """fsync of a path, or a rename of one to another."""

    name: str
    path: Path
    to: Path | None = None


def calls(trace: str) -> Iterator[Call]:
    """The calls of a trace that did what they were asked to."""
    for line in trace.splitlines():
        found = CALL.match(line)
        if found is None or found[3] != "0":
            continue
        if found[1] in {"fsync", "fdatasync"}:
            opened = OPENED.match(found[2])
            assert opened is not None, line
            yield Call("fsync", Path(opened[1]))
        elif found[1].startswith("rename"):
            old, new = NAMES.findall(found[2])
            yield Call("rename", Path(old), Path(new))


def wrong_order(done: list[Call], run: Path) -> list[str]:
    """What is renamed before all of it, or forgotten because its folder, is not flushed."""
    problems = []
    for number, call in enumerate(done):
        if call.to is None or not call.to.is_relative_to(run):
            continue
        flushed = {c.path for c in done[:number] if c.name == "fsync"}
        pruned = call.path.name.startswith("checkpoint-")
        parts = [call.path]
        if not pruned and call.to.name.startswith("checkpoint-"):
            # files of it were renamed into place there, and flushed under their first names
            moved = {c.to: c.path for c in done[:number] if c.to is not None}
            names = ("adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
            paths = [call.path / name for name in names]
            parts += [path if path in flushed else moved.get(path, path) for path in paths]
        if not pruned:
            problems += [
                f"{part} is not flushed before {call}" for part in parts if part not in flushed
            ]
        after = [c.path for c in done[number + 1 : number + 2] if c.name == "fsync"]
        if after != [call.to.parent]:
            problems.append(f"{call.to.parent} is not flushed after {call}")
    return problems


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Call], Path]:
    """The calls of two saves, the second of which prunes the first."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("no strace here")
    run = tmp_path_factory.mktemp("run")
    output = run.parent / "trace.txt"
    command = [strace, "-f", "-y", "-o", output, "-e", "trace=fsync,fdatasync,/^rename"]
    done = subprocess.run(
        [*command, sys.executable, "-c", SAVE, run], capture_output=True, text=True, cwd=ROOT
    )
    if "ptrace" in done.stderr and "not permitted" in done.stderr:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["saved", "checkpoint-000001", "saved", "checkpoint-000002"]
    return list(calls(output.read_text())), run


def test_all_is_flushed_before_each_rename_and_the_folder_after_it(
    trace: tuple[list[Call], Path],
) -> None:
    done, run = trace
    renamed = [call.to.name for call in done if call.to is not None]
    assert [name for name in renamed if name.startswith("checkpoint-")] == [
        "checkpoint-000001",
        "checkpoint-000002",
    ]
    assert sum(name.startswith(".staging-checkpoint-000001") for name in renamed) == 1  # pruned
    assert wrong_order(done, run) == []


def test_a_flush_that_is_left_out_would_be_seen(trace: tuple[list[Call], Path]) -> None:
    done, run = trace
    flushes = [call for call in done if call.name == "fsync" and run in call.path.parents]
    moved = {call.to: call.path for call in done if call.to is not None}
    assert len(flushes) > 10
    unseen = []
    for flush in flushes:
        twice = Call("fsync", moved.get(flush.path, flush.path))  # under its first name, too
        if not wrong_order([call for call in done if call not in {flush, twice}], run):
            unseen.append(flush)
    assert unseen == []

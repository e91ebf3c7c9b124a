"""The contract of exit codes, a row for each, through the command line."""

import signal
from pathlib import Path

import pytest

from tests.torture.invariants import assert_invariants, assert_message
from tests.torture.sessions import ForkServer
from tests.torture.workload import Workload

HOOKS = "tests.torture.hooks"
TRAIN = ("train", "{config}", "--set", "train.steps=1")
STEP = "eri.train.step.Step.__call__"

ROWS: dict[str, tuple[int, tuple[str, ...], tuple[str, object] | None, str]] = {
    # what happens: code, command, hook, what is said on stderr
    "trained": (0, TRAIN, None, ""),
    "exported": (0, ("export-lora", "{straight}", "-o", "{new}"), None, ""),
    "a command that does not exist": (2, ("rain", "{config}"), None, "No such command"),
    "a key that does not exist": (2, (*TRAIN, "--set", "train.stesp=2"), None, "did you mean"),
    "a changed setting on resume": (2, ("train", "{resumed}", "--set", "train.lr=1"), None, "lr"),
    "no images": (3, (*TRAIN, "--set", "data={folder}/none"), None, "no such folder"),
    "no model": (4, (*TRAIN, "--set", "model={folder}/none"), None, "no such model"),
    "no adapter": (4, ("inspect", "{config}"), None, ""),
    "a file where the folder would be": (5, (*TRAIN, "--set", "output={config}/a"), None, "not a"),
    "a full disk": (5, TRAIN, ("fail", ["os.fsync", "OSError", 28, ""]), "the disk is full"),
    "an output that exists": (6, ("export-lora", "{straight}", "-o", "{config}"), None, "exists"),
    "no memory": (7, TRAIN, ("fail", [STEP, "torch.OutOfMemoryError"]), "out of memory"),
    "no processes": (
        8,
        (*TRAIN, "--set", "train.workers=1", "--set", "train.steps=2"),
        ("fail", ["eri.run.workers._loader", "OSError", 11, "no processes left"]),
        "no processes left",
    ),
    "not a number": (9, TRAIN, ("give_nan", ["eri.run.objective.Objective.__call__"]), "step 1"),
    "SIGINT": (130, TRAIN, ("send", [STEP, signal.SIGINT]), ""),
    "SIGTERM": (143, TRAIN, ("send", [STEP, signal.SIGTERM]), ""),
}


@pytest.mark.parametrize("row", ROWS)
def test_every_end_has_its_code(
    workload: Workload, straight: Workload, server: ForkServer, tmp_path: Path, row: str
) -> None:
    code, command, hook, said = ROWS[row]
    places = {
        "config": workload.config,
        "straight": straight.run,
        "resumed": straight.config,
        "new": tmp_path / "new.safetensors",
        "folder": tmp_path,
    }
    name, given = hook or ("", [])
    ended = server.start(
        *(word.format_map(places) for word in command),
        folder=tmp_path / "session",
        hook=f"{HOOKS}:{name}" if name else None,
        given=given,
    ).wait()
    assert ended.code == code, ended.out + ended.err
    assert said in ended.err
    if 0 < code < 100:
        assert_message(ended.err)
    if "{config}" in command and workload.run.exists():
        assert_invariants(workload.run, ended)
    if code in {2, 3, 4}:
        assert not workload.run.exists()


def test_every_code_of_the_contract_has_a_row() -> None:
    assert {row[0] for row in ROWS.values()} == {0, *range(2, 10), 130, 143}

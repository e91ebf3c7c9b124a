"""O1: a run that is out of memory goes on with less, or ends with all that it has done saved."""

import json
from pathlib import Path

import pytest
import torch

from eri.formats.tensors import load_tensors
from tests.torture.invariants import Seen, assert_invariants
from tests.torture.sessions import Ended, ForkServer
from tests.torture.workload import Workload, digest, logged_steps

HOOK = "tests.torture.step_faults:out_of_memory"
STEPS = 6  # saved after 4 and 6
PREVIEWS = ("--set", "sample.every=2", "--set", "sample.size=64", "--set", "sample.steps=1")
DROPS = ("--set", "adapter.dropout=0.1")  # whose masks hang on how a batch is divided
EXACT = (*DROPS, "--set", "train.deterministic=true", "--set", "train.schedule=constant")


class Short:
    """A workload of some steps without dropout, and what runs a session of it."""

    def __init__(self, folder: Path, server: ForkServer, straight: Workload) -> None:
        images = straight.folder / "photos"
        self.work = Workload.make(folder, straight.model, steps=STEPS, images=images)
        self.folder = self.work.run
        self.server = server
        self.cache = straight.folder / "cache"

    def __call__(self, *settings: str, fault: tuple[str, int, int] | None = None) -> Ended:
        session = self.server.start(
            *("train", self.work.config, "--set", "adapter.dropout=0", *settings),
            folder=self.work.folder / "session",
            env={"ERI_CACHE": str(self.cache)},
            hook=HOOK if fault else None,
            given=fault or (),
        )
        return session.wait()

    def log(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def run(tmp_path: Path, server: ForkServer, straight: Workload) -> Short:
    return Short(tmp_path / "short", server, straight)


@pytest.fixture(scope="session")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, server: ForkServer, straight: Workload
) -> Short:
    """A run without a fault; read only."""
    run = Short(tmp_path_factory.mktemp("undisturbed"), server, straight)
    assert run().code == 0
    return run


def test_a_step_that_fails_once_is_taken_in_halves(run: Short, undisturbed: Short) -> None:
    ended = run(fault=("step", 3, 1))
    assert_invariants(run.folder, ended, before=Seen())
    assert ended.code == 0, ended.err
    assert ended.out.count("out of memory in step 3; going on with 1 image at once") == 1
    assert [line["files"] for line in run.log()] == [line["files"] for line in undisturbed.log()]
    losses, wanted = ([line["loss"] for line in one.log()] for one in (run, undisturbed))
    assert losses[:2] == wanted[:2] and losses == pytest.approx(wanted, rel=1e-4)
    mine, theirs = load_tensors(run.work.adapter), load_tensors(undisturbed.work.adapter)
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-2, atol=2e-5)


def test_without_a_step_there_is_nothing_to_save(run: Short) -> None:
    ended = run(fault=("step", 1, 2))
    seen = assert_invariants(run.folder, ended, before=Seen())
    assert (ended.code, seen.step) == (7, 0), ended.err
    assert ended.err.rstrip().endswith("nothing is saved")


def test_what_fails_twice_is_saved_and_goes_on_bit_by_bit(run: Short, undisturbed: Short) -> None:
    ended = run(fault=("limit", 3, 2))
    seen = assert_invariants(run.folder, ended, before=Seen())
    assert (ended.code, seen.step) == (7, 2), ended.err
    assert "eri: error: out of memory, and again with 1 image at once (step 3)" in ended.err
    hint = "set train.memory: small, which runs a batch in the least memory"
    assert f"hint: {hint}; checkpoint-000002 is the last good one" in ended.err
    assert logged_steps(run.folder) == [1, 2]
    again = run()
    assert_invariants(run.folder, again, before=seen)
    assert "same from here: memory.halved: 1 before, None now" in again.out
    assert digest(run.folder) == digest(undisturbed.folder)


def test_previews_are_left_out_and_change_nothing(run: Short, undisturbed: Short) -> None:
    ended = run(*PREVIEWS, fault=("previews", 0, 2))
    assert_invariants(run.folder, ended, before=Seen())
    assert ended.code == 0, ended.err
    for step in (0, 2, 4, 6):
        assert f"warning: step {step}: previews left out: out of memory" in ended.out
    assert not list(run.folder.glob("samples/*"))
    assert digest(run.folder) == digest(undisturbed.folder)


def test_a_save_that_fails_leaves_what_was_saved_before(run: Short, undisturbed: Short) -> None:
    ended = run(fault=("save", 6, 1))
    seen = assert_invariants(run.folder, ended, before=Seen())
    assert (ended.code, seen.step) == (7, 4), ended.err
    again = run()
    assert_invariants(run.folder, again, before=seen)
    assert digest(run.folder) == digest(undisturbed.folder)


def test_half_an_update_is_never_saved(run: Short) -> None:
    ended = run(fault=("update", 6, 1))
    seen = assert_invariants(run.folder, ended, before=Seen())
    assert (ended.code, seen.step) == (7, 4), ended.err
    assert "out of memory within the update, which is not saved (step 6)" in ended.err
    assert "checkpoint-000004 is the last good one" in ended.err


def test_a_deterministic_run_goes_on_in_halves_as_it_was_halved(
    run: Short, tmp_path: Path, server: ForkServer, straight: Workload
) -> None:
    other = Short(tmp_path / "straight", server, straight)
    assert other(*EXACT, fault=("step", 2, 1)).code == 0
    assert run(*EXACT, "--set", "train.steps=4", fault=("step", 2, 1)).code == 0
    again = run(*EXACT)
    assert_invariants(run.folder, again)
    assert again.code == 0 and "note: not bit by bit" not in again.out, again.err
    assert digest(run.folder) == digest(other.folder)

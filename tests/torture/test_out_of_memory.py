"""O1: a run that is out of memory goes on with less, or ends with all that it has done saved."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eri.formats.tensors import load_tensors
from tests.torture.invariants import Seen, assert_invariants
from tests.torture.sessions import Ended, ForkServer
from tests.torture.workload import Workload, digest, logged_steps

HOOK = "tests.torture.step_faults:out_of_memory"
STEPS = 6  # saved after 4 and 6
PLAIN = ("--set", "adapter.dropout=0")  # whose masks hang on how a batch is divided
PREVIEWS = ("--set", "sample.every=2", "--set", "sample.size=64", "--set", "sample.steps=1")
EXACT = ("--set", "train.deterministic=true", "--set", "train.schedule=constant")

Run = Callable[..., Ended]


@pytest.fixture(scope="session")
def begin(server: ForkServer, straight: Workload) -> Callable[[Path], tuple[Workload, Run]]:
    """A short workload in a folder, and what runs a session of it with a fault."""

    def made(folder: Path) -> tuple[Workload, Run]:
        images = straight.folder / "photos"
        work = Workload.make(folder, straight.model, steps=STEPS, images=images)

        def run(*settings: str, fault: tuple[str, int, int] | None = None) -> Ended:
            session = server.start(
                *("train", work.config, *settings),
                folder=folder / "session",
                env={"ERI_CACHE": str(straight.folder / "cache")},
                hook=HOOK if fault else None,
                given=fault or (),
            )
            return session.wait()

        return work, run

    return made


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, begin: Callable) -> dict[str, object]:
    """The digest of a run without a fault."""
    work, run = begin(tmp_path_factory.mktemp("undisturbed"))
    assert run().code == 0
    return digest(work.run)


def log(work: Workload) -> list[dict]:
    return [json.loads(line) for line in (work.run / "log.jsonl").read_text().splitlines()]


def test_a_step_that_fails_once_is_taken_in_halves(
    begin: Callable, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (work, run), (plain, run_plain) = begin(tmp_path / "short"), begin(tmp_path / "enough")
    ended = run(*PLAIN, fault=("step", 3, 1))
    assert_invariants(work.run, ended, before=Seen())
    assert ended.code == 0, ended.err
    assert ended.out.count("out of memory in step 3; going on with 1 image at once") == 1
    assert run_plain(*PLAIN).code == 0
    assert [line["files"] for line in log(work)] == [line["files"] for line in log(plain)]
    losses, wanted = ([line["loss"] for line in log(one)] for one in (work, plain))
    assert losses[:2] == wanted[:2] and losses == pytest.approx(wanted, rel=1e-4)
    mine, theirs = load_tensors(work.adapter), load_tensors(plain.adapter)
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-2, atol=2e-5)


@pytest.mark.parametrize(
    ("where", "step", "saved"), [("step", 1, 0), ("limit", 3, 2), ("step", 6, 5)]
)
def test_what_fails_twice_is_saved_and_goes_on_bit_by_bit(
    begin: Callable, tmp_path: Path, undisturbed: dict, where: str, step: int, saved: int
) -> None:
    work, run = begin(tmp_path / "short")
    ended = run(fault=(where, step, 2))
    seen = assert_invariants(work.run, ended, before=Seen())
    assert (ended.code, seen.step) == (7, saved), ended.err
    assert f"and again with 1 image at once (step {step})" in ended.err
    last = f"checkpoint-{saved:06} is the last good one" if saved else "nothing is saved"
    assert f"hint: set train.memory: small, which runs a batch in the least memory; {last}" in (
        ended.err
    )
    assert logged_steps(work.run) == list(range(1, saved + 1))
    again = run()
    assert_invariants(work.run, again, before=seen)
    assert again.code == 0
    assert digest(work.run) == undisturbed
    halved = "note: not bit by bit the same from here: memory.halved: 1 before, None now"
    assert (halved in again.out) == bool(saved)


@pytest.mark.parametrize("where", ["sampler", "decoder"])
def test_previews_are_left_out_and_change_nothing(
    begin: Callable, tmp_path: Path, undisturbed: dict, where: str
) -> None:
    work, run = begin(tmp_path / "short")
    ended = run(*PREVIEWS, fault=(where, 0, 1))
    assert_invariants(work.run, ended, before=Seen())
    assert ended.code == 0, ended.err
    for step in (0, 2, 4, 6):
        assert f"warning: step {step}: previews left out: out of memory" in ended.out
    assert not list(work.run.glob("samples/*"))
    assert digest(work.run) == undisturbed


@pytest.mark.parametrize(
    ("where", "step", "saved", "words"),
    [
        ("save", 4, 0, "out of memory"),
        ("save", 6, 4, "out of memory"),
        ("update", 3, 0, "out of memory within the update, which is not saved (step 3)"),
        ("update", 6, 4, "out of memory within the update, which is not saved (step 6)"),
    ],
)
def test_a_save_or_an_update_that_fails_leaves_what_was_saved_before(
    begin: Callable,
    tmp_path: Path,
    undisturbed: dict,
    where: str,
    step: int,
    saved: int,
    words: str,
) -> None:
    work, run = begin(tmp_path / "short")
    ended = run(fault=(where, step, 1))
    seen = assert_invariants(work.run, ended, before=Seen())
    assert (ended.code, seen.step) == (7, saved), ended.err
    assert words in ended.err
    again = run()
    assert_invariants(work.run, again, before=seen)
    assert digest(work.run) == undisturbed


@pytest.mark.parametrize("exact", [True, False])
def test_a_deterministic_run_goes_on_in_halves_as_it_was_halved(
    begin: Callable, tmp_path: Path, exact: bool
) -> None:
    settings = EXACT if exact else EXACT[2:]
    (work, run), (other, straight) = begin(tmp_path / "stopped"), begin(tmp_path / "straight")
    assert straight(*settings, fault=("step", 2, 1)).code == 0
    assert run(*settings, "--set", "train.steps=4", fault=("step", 2, 1)).code == 0
    again = run(*settings)
    assert_invariants(work.run, again)
    assert again.code == 0, again.err
    same = {key: value for key, value in digest(work.run).items() if key != "finished"}
    assert (same == {key: digest(other.run)[key] for key in same}) is exact
    assert ("memory.halved: 1 before, None now" in again.out) is not exact

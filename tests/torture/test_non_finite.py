"""N1: what is not finite ends a run before it is saved, and the run goes on from before it."""

from pathlib import Path

import pytest

from tests.torture.invariants import Seen, assert_invariants
from tests.torture.sessions import Ended, ForkServer
from tests.torture.step_faults import NOT_FINITE
from tests.torture.workload import Workload, logged_steps

HOOK = "tests.torture.step_faults:not_finite"
STEPS = 6  # saved after 4 and 6
FIRST, MIDDLE, LAST = 1, 5, STEPS

LATER = {"adapter weight": 0, "optimizer state": 1}
"""What is no input of its step shows so many steps later: a moment changes the weights first."""


def run(work: Workload, server: ForkServer, straight: Workload, *fault: object) -> Ended:
    session = server.start(
        *("train", work.config),
        folder=work.folder / "session",
        env={"ERI_CACHE": str(straight.folder / "cache")},
        hook=HOOK if fault else None,
        given=fault,
    )
    return session.wait()


@pytest.fixture
def work(tmp_path: Path, straight: Workload) -> Workload:
    images = straight.folder / "photos"
    return Workload.make(tmp_path / "short", straight.model, steps=STEPS, images=images)


ROWS = [
    ("latent", FIRST),
    ("text", MIDDLE),
    ("base weight", MIDDLE),
    ("gradient", MIDDLE),
    ("adapter weight", MIDDLE),
    ("loss", LAST),
    ("optimizer state", LAST),
]
assert {where for where, _ in ROWS} == NOT_FINITE.keys()


@pytest.mark.parametrize(("where", "step"), ROWS)
def test_it_is_never_saved_and_its_images_are_named(
    work: Workload,
    server: ForkServer,
    straight: Workload,
    where: str,
    step: int,
) -> None:
    ended = run(work, server, straight, where, step)
    seen = assert_invariants(work.run, ended, before=Seen())
    saved = 4 if step > 4 else 0
    assert (ended.code, seen.step) == (9, saved), ended.err
    last = f"checkpoint-{saved:06} is the last good one" if saved else "nothing is saved"
    assert ended.err.rstrip().endswith(last)
    told = step + LATER.get(where, 0)
    if told <= STEPS:  # else the save refuses it
        assert f"(step {told})" in ended.err and ", at a rate of " in ended.err
        assert ended.err.count(".png, timestep ") == 2
    if where == "gradient":
        again = run(work, server, straight)
        assert_invariants(work.run, again, before=seen)
        assert again.code == 0 and logged_steps(work.run) == list(range(1, STEPS + 1))

"""K3: a run that is killed again and again ends with the very numbers of one that was not."""

import pytest

from tests.torture import kills
from tests.torture.invariants import assert_invariants
from tests.torture.sessions import ForkServer, Session, start
from tests.torture.workload import STEPS, Workload, digest, logged_steps


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_that_was_killed_ends_bit_by_bit_the_same(
    workload: Workload, straight: Workload, server: ForkServer, seed: int
) -> None:
    def begin(number: int) -> Session:
        return server.start("train", workload.config, folder=workload.folder / str(number))

    done = kills.training(workload, begin, kills=3, seed=seed)
    assert done.kills == 3 and done.finished > 0
    assert digest(workload.run) == digest(straight.run)


def test_so_does_one_of_fresh_pythons(workload: Workload, straight: Workload) -> None:
    def begin(number: int) -> Session:
        return start("train", workload.config, folder=workload.folder / str(number))

    assert kills.training(workload, begin, kills=1, seed=3).kills == 1
    assert digest(workload.run) == digest(straight.run)
    assert logged_steps(workload.run) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("left_out", [None, "noise", "data", "rate", "moments"])
def test_what_is_left_out_of_going_on_shows_in_the_digest(
    workload: Workload, straight: Workload, server: ForkServer, left_out: str | None
) -> None:
    workload.copy_run(straight)
    step = workload.take_back()
    hook = None if left_out is None else f"tests.torture.breaks:forget_{left_out}"
    session = server.start(
        "train", workload.config, folder=workload.folder / "said", hook=hook, given=[step]
    )
    ended = session.wait()
    assert ended.code == 0, ended.err
    assert f"going on from step {step}" in ended.out
    assert (digest(workload.run) == digest(straight.run)) is (left_out is None)


@pytest.mark.parametrize("exact", [False, True])
def test_another_number_of_threads_is_noted_or_refused(
    workload: Workload, straight: Workload, server: ForkServer, exact: bool
) -> None:
    workload.copy_run(straight)
    step = workload.take_back()
    seen = assert_invariants(workload.run)
    session = server.start(
        "train",
        workload.config,
        *(["--set", "train.deterministic=true"] if exact else []),
        folder=workload.folder / "said",
        hook="tests.torture.breaks:other_threads",
        given=[step],
    )
    ended = session.wait()
    assert_invariants(workload.run, ended, before=seen)
    told = "threads: 1 before, 2 now"
    if exact:
        assert ended.code == 2 and f"  {told}" in ended.err.splitlines()
    else:
        assert ended.code == 0, ended.err
        notes = [line for line in ended.out.splitlines() if line.startswith("note: not bit")]
        assert notes == [f"note: not bit by bit the same from here: {told}"]

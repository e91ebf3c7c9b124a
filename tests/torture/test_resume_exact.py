"""A run that is killed again and again ends with the very numbers of one that was not."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.torture.invariants import Seen, assert_invariants
from tests.torture.sessions import ForkServer, Session, start
from tests.torture.workload import STEPS, Workload, digest, logged_steps

KILLS = 3  # at least, in each run


def kill_until_done(
    workload: Workload, begin, *, seed: int, kills: int = KILLS
) -> tuple[int, list[int]]:
    """Kill sessions in the middle of training, then let one finish.

    Returns:
        How many kills fell in training, and the steps that each had reached.
    """
    draw = random.Random(seed)
    seen, reached = Seen(), []
    while len(reached) < kills:
        share = (STEPS - seen.step) // (kills - len(reached) + 1)  # the rest is for later kills
        target = seen.step + draw.randint(1, max(share, 1))
        session: Session = begin(len(reached))
        grew = session.wait_for(lambda least=target: last_step(workload.run) >= least)
        assert grew, f"the session ended by itself:\n{session.out}{session.err}"
        time.sleep(draw.uniform(0, 0.2))
        session.kill()
        ended = session.wait()
        assert ended.code == -signal.SIGKILL, "the kill came too late"
        seen = assert_invariants(workload.run, ended, before=seen)
        reached.append(last_step(workload.run))
    ended = begin(kills).wait()
    assert ended.code == 0, ended.err
    assert_invariants(workload.run, ended, before=seen)
    return kills, reached


def last_step(run: Path) -> int:
    return max(logged_steps(run), default=0)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_that_was_killed_ends_bit_by_bit_the_same(
    workload: Workload, straight: Workload, server: ForkServer, seed: int
) -> None:
    def begin(number: int) -> Session:
        return server.start("train", workload.config, folder=workload.folder / str(number))

    kill_until_done(workload, begin, seed=seed)
    assert digest(workload.run) == digest(straight.run)


def test_so_does_one_of_fresh_pythons(workload: Workload, straight: Workload) -> None:
    def begin(number: int) -> Session:
        return start("train", workload.config, folder=workload.folder / str(number))

    kill_until_done(workload, begin, seed=3)
    assert digest(workload.run) == digest(straight.run)
    assert logged_steps(workload.run) == list(range(1, STEPS + 1))

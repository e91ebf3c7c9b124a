"""Processes that begin on one folder: exactly one runs, the others are refused at once."""

import resource
import signal
import time
from pathlib import Path

from tests.torture.invariants import assert_invariants, assert_message
from tests.torture.sessions import ForkServer, start
from tests.torture.workload import Workload

REFUSED_WITHIN = 1.0  # second, on a machine that does nothing else
BUSY = 3  # times as long where other tests run


def test_a_second_process_is_refused_within_a_second_and_a_dead_one_holds_nothing(
    workload: Workload, server: ForkServer, tmp_path: Path
) -> None:
    one = ("train", workload.config, "--set", "train.steps=1")
    holder = server.start(*one, folder=tmp_path / "holder")
    lock = workload.run / "run.lock"
    assert holder.wait_for(lambda: lock.exists() and bool(lock.read_bytes()))
    holder.kill(signal.SIGSTOP)
    before, took = resource.getrusage(resource.RUSAGE_CHILDREN), []
    for number in range(2):
        began = time.monotonic()
        ended = start(*one, folder=tmp_path / str(number)).wait()
        took.append(time.monotonic() - began)
        assert ended.code == 6
        assert_message(ended.err)
        assert f"the folder is in use by process {holder.pid} on " in ended.err
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    computed = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert computed < 2 * REFUSED_WITHIN, f"{computed:.1f} s of the processor for two refusals"
    assert min(took) < BUSY * REFUSED_WITHIN, took

    holder.kill(signal.SIGKILL)
    assert holder.wait().code == -signal.SIGKILL
    ended = server.start(*one, folder=tmp_path / "next").wait()
    assert ended.code == 0, ended.err
    assert_invariants(workload.run, ended)


def test_of_ten_processes_exactly_one_runs(
    workload: Workload, server: ForkServer, tmp_path: Path
) -> None:
    sessions = [
        server.start(
            *("train", workload.config, "--set", "train.steps=1"), folder=tmp_path / str(number)
        )
        for number in range(10)
    ]
    ended = sorted((session.wait() for session in sessions), key=lambda ended: ended.code)
    assert [one.code for one in ended] == [0] + [6] * 9
    for one in ended[1:]:
        assert_message(one.err)
        assert one.out == ""
    assert_invariants(workload.run, ended[0])


def test_a_run_that_cannot_begin_leaves_the_folder_to_the_next(
    workload: Workload, server: ForkServer, tmp_path: Path
) -> None:
    """Each makes it, locks it, finds no model and deletes it; none is told of a broken disk."""
    sessions = [
        server.start(
            *("train", workload.config, "--set", f"model={tmp_path / 'none'}"),
            folder=tmp_path / str(number),
        )
        for number in range(6)
    ]
    codes = {session.wait().code for session in sessions}
    assert codes <= {4, 6} and 4 in codes
    assert not workload.run.exists()

"""What a run meets beside kills and signals, and goes on after: numbers, workers, clocks."""

import os
from dataclasses import replace
from pathlib import Path

from tests.torture.invariants import assert_invariants
from tests.torture.sessions import Ended, ForkServer
from tests.torture.workload import Workload, digest, logged_steps

FEW = ("--set", "train.steps=6", "--set", "save.every=2")
HOOKS = "tests.torture.hooks"


def run(
    work: Workload, server: ForkServer, *more: str, hook: str | None = None, given: object = ()
) -> Ended:
    return server.start(
        *("train", work.config, *more),
        folder=work.folder / "session",
        hook=hook and f"{HOOKS}:{hook}",
        given=list(given),  # type: ignore[call-overload]
    ).wait()


def test_a_number_too_large_for_the_adapters_type_ends_one_session_and_not_the_next(
    workload: Workload, server: ForkServer
) -> None:
    ended = run(workload, server, *FEW, hook="outgrow", given=(4, 7e4))
    seen = assert_invariants(workload.run, ended)
    assert (ended.code, seen.step) == (9, 4), ended.err
    assert "too large for float16" in ended.err and "lora_unet_" in ended.err
    again = run(workload, server, *FEW, hook="outgrow", given=(6, 0.5))
    assert again.code == 0, again.err
    assert "warning: step 4 has no adapter of its own" in again.out
    assert assert_invariants(workload.run, again, before=seen).step == 6
    assert logged_steps(workload.run) == list(range(1, 7))


def test_workers_that_are_killed_again_and_again_end_the_run_and_it_goes_on(
    workload: Workload, server: ForkServer
) -> None:
    settings = ("--set", "train.steps=12", "--set", "save.every=2")
    ended = run(workload, server, *settings, "--set", "train.workers=1", hook="kill_workers")
    assert ended.code == 8, ended.out + ended.err
    # a fork ends without cleaning up semaphores, of which Python's tracker of them tells
    ended = replace(ended, err=ended.err.partition("\n/")[0])
    assert "ended with SIGKILL; workers were begun anew 3 times before" in ended.err
    seen = assert_invariants(workload.run, ended)
    assert seen.step >= 2
    again = run(workload, server, *settings)
    assert again.code == 0, again.err
    assert f"going on from step {seen.step}" in again.out
    assert_invariants(workload.run, again, before=seen)
    assert logged_steps(workload.run) == list(range(1, 13))


def test_a_clock_that_is_set_back_changes_nothing(
    workload: Workload, straight: Workload, server: ForkServer
) -> None:
    """The newest checkpoint is that of the last step, not that of the latest time."""
    workload.copy_run(straight)
    step = workload.take_back()
    newest = workload.run / f"checkpoint-{step:06}"
    for path in workload.run.rglob("*"):
        set_time(path, 10.0 if newest in (path, path.parent) else 3e9)
    seen = assert_invariants(workload.run)
    ended = run(workload, server, hook="turn_back", given=(1e9,))
    assert ended.code == 0, ended.err
    assert f"going on from step {step}" in ended.out
    assert_invariants(workload.run, ended, before=seen)
    assert digest(workload.run) == digest(straight.run)
    kept = {path.name for path in straight.run.glob("checkpoint-*")}
    assert {path.name for path in workload.run.glob("checkpoint-*")} >= kept - {newest.name}


def set_time(path: Path, seconds: float) -> None:
    os.utime(path, (seconds, seconds))

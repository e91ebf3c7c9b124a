"""Signals and lost streams, at every moment of a run: its code, what is saved, how it goes on."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.torture.invariants import Seen, assert_invariants, newest_step
from tests.torture.sessions import Ended, ForkServer, Session, start
from tests.torture.workload import Workload, digest, logged_steps

HOOKS = "tests.torture.hooks"
SECONDS = 10  # between a signal and the end of so small a run, at most
FEW = ("--set", "train.steps=6", "--set", "save.every=2")
PREVIEWS = "sample={every: 4, steps: 2, size: 64, prompts: [a red apple]}"


def staged(run: Path) -> bool:
    """Whether a checkpoint is being written, beside one that is saved."""
    return any(run.glob(".staging-*")) and any(run.glob("checkpoint-*"))


def assert_stopped(ended: Ended, run: Path, number: int) -> Seen:
    """The code of the signal, and every finished step saved."""
    assert ended.code == 128 + number, ended.err
    assert ended.err == "eri: stopped\n"
    seen = assert_invariants(run, ended)
    assert seen.step == max(logged_steps(run), default=0)
    return seen


def signalled(session: Session, number: int, moment: Callable[[], bool]) -> Ended:
    """Send a signal at a moment, and wait."""
    assert session.wait_for(moment), "it ended before"
    sent = time.monotonic()
    session.kill(number)
    ended = session.wait()
    assert time.monotonic() - sent < SECONDS
    return ended


def test_a_run_that_is_stopped_anywhere_saves_its_step_and_goes_on_bit_by_bit(
    workload: Workload, straight: Workload, server: ForkServer, tmp_path: Path
) -> None:
    run, seen = workload.run, None
    steps = sorted(random.sample(range(1, 38), 2))
    for at, number in zip(steps, (signal.SIGTERM, signal.SIGINT), strict=True):
        session = server.start("train", workload.config, folder=tmp_path / str(at))
        ended = signalled(session, number, lambda at=at: max(logged_steps(run), default=0) >= at)
        seen = assert_stopped(ended, run, number)
        assert seen.step >= at
        assert f"stopped at step {seen.step} of 40; eri train {run / 'config.yaml'}" in ended.out
    ended = server.start("train", workload.config, folder=tmp_path / "last").wait()
    assert ended.code == 0
    assert_invariants(run, ended, before=seen)
    assert digest(run) == digest(straight.run)


@pytest.mark.parametrize(
    ("number", "during", "slow"),
    [
        (signal.SIGINT, "saving", "os.fsync"),
        (signal.SIGTERM, "previews", "eri.run.preview.Painter.paint"),
        (signal.SIGINT, "caching", "eri.data.cache.write_entry"),
    ],
)
def test_a_run_that_is_stopped_beside_its_steps_keeps_them(
    workload: Workload, server: ForkServer, tmp_path: Path, number: int, during: str, slow: str
) -> None:
    run, cache = workload.run, tmp_path / "cache"
    moments = {
        "saving": lambda: staged(run),
        "previews": lambda: (run / "checkpoint-000004").exists(),
        "caching": lambda: any(cache.glob("latents/*/*.latent")),
    }
    session = server.start(
        *("train", workload.config, *FEW, *(("--set", PREVIEWS) if during == "previews" else ())),
        folder=tmp_path / "session",
        env={"ERI_CACHE": str(cache)} if during == "caching" else {},
        hook=f"{HOOKS}:slow",
        given=[[slow, 0.2]],
    )
    seen = assert_stopped(signalled(session, number, moments[during]), run, number)
    assert (seen.step > 0) == (during != "caching")
    if during == "previews":
        assert seen.step == 4


@pytest.mark.parametrize(
    ("numbers", "code", "cleaning"),
    [
        ([signal.SIGINT] * 2, 130, 0.0),
        ([signal.SIGTERM] * 3, 143, 1.5),
        ([signal.SIGTERM, signal.SIGKILL], -signal.SIGKILL, 0.0),
        ([signal.SIGHUP], -signal.SIGHUP, 0.0),
    ],
    ids=["INT twice", "TERM thrice", "TERM, then KILL", "HUP"],
)
def test_more_signals_end_a_save_at_once_and_what_was_saved_stays(
    workload: Workload,
    server: ForkServer,
    tmp_path: Path,
    numbers: list[int],
    code: int,
    cleaning: float,
) -> None:
    """The second is a clean end; the third does not wait for the cleaning, which takes seconds."""
    session = server.start(
        *("train", workload.config, *FEW),
        folder=tmp_path / "session",
        hook=f"{HOOKS}:slow",
        given=[["os.fsync", 0.2], ["shutil.rmtree", cleaning]],
    )
    assert session.wait_for(lambda: staged(workload.run)), "it ended before"
    before = Seen(newest_step(workload.run))
    for number in numbers:
        session.kill(number)
        time.sleep(0.1)
    ended = session.wait(patience=SECONDS)
    assert ended.code == code, ended.err
    assert ended.err == ("eri: stopped\n" if code > 0 else "")
    at_once = cleaning > 0 or code < 0
    seen = assert_invariants(workload.run, ended, before=before, killed=at_once)
    assert before.step > 0
    if code > 0:  # a kill may come between two saves
        assert seen.step == before.step
        assert any(workload.run.glob(".staging-*")) == at_once


@pytest.mark.parametrize("way", ["no reader", "full disk"])
def test_a_run_goes_on_when_nobody_can_read_what_it_says(
    workload: Workload, server: ForkServer, tmp_path: Path, way: str
) -> None:
    ended = server.start(
        *("train", workload.config, "--set", "train.steps=1"),
        folder=tmp_path / "session",
        hook=f"{HOOKS}:lose",
        given=[1, way],
    ).wait()
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    assert_invariants(workload.run, ended)


@pytest.mark.parametrize(
    ("way", "code", "err"),
    [
        ("closed", 0, ""),
        ("no reader", 0, ""),
        ("full disk", 5, "eri: error: the disk is full (standard output)\nhint: "),
    ],
)
@pytest.mark.parametrize("command", [["--help"], ["inspect"], ["inspect", "--json"]])
def test_other_commands_end_quietly_unless_what_they_say_is_lost_to_a_full_disk(
    straight: Workload,
    server: ForkServer,
    tmp_path: Path,
    command: list[str],
    way: str,
    code: int,
    err: str,
) -> None:
    target = [] if command == ["--help"] else [straight.adapter]
    session = server.start(
        *command, *target, folder=tmp_path / "session", hook=f"{HOOKS}:lose", given=[1, way]
    )
    ended = session.wait()
    assert ended.code == code
    assert ended.err.startswith(err) and bool(ended.err) == bool(err)


@pytest.mark.parametrize("way", ["closed", "no reader", "full disk"])
def test_an_error_that_nobody_reads_keeps_its_code(
    server: ForkServer, tmp_path: Path, way: str
) -> None:
    session = server.start(
        *("train", "absent.yaml", "--debug"),
        folder=tmp_path / "session",
        hook=f"{HOOKS}:lose",
        given=[2, way],
    )
    ended = session.wait()
    assert (ended.code, ended.out, ended.err) == (2, "", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_start_ends_it_quietly(
    workload: Workload, tmp_path: Path, number: int
) -> None:
    """From the first moment on, through all imports; what was made for the run is gone."""
    for delay in (0.0, 0.6):
        session = start("train", workload.config, folder=tmp_path / str(delay))
        assert session.wait_for(lambda session=session: catches(session.pid, signal.SIGTERM))
        time.sleep(delay)
        session.kill(number)
        ended = session.wait(patience=SECONDS)
        assert (ended.code, ended.out, ended.err) == (128 + number, "", "eri: stopped\n")
        assert not workload.run.exists()


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal; Python itself has none for SIGTERM."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_export_that_is_stopped_leaves_the_old_file_and_nothing_else(
    straight: Workload, server: ForkServer, tmp_path: Path, number: int
) -> None:
    output = tmp_path / "out" / "a.safetensors"
    output.parent.mkdir()
    output.write_bytes(b"old")
    session = server.start(
        *("export-lora", straight.run, "-o", output, "--overwrite"),
        folder=tmp_path / "session",
        hook=f"{HOOKS}:slow",
        given=[["os.fsync", 60]],
    )
    ended = signalled(session, number, lambda: any(output.parent.glob(".writing-*")))
    assert (ended.code, ended.err) == (128 + number, "eri: stopped\n")
    assert [path.read_bytes() for path in output.parent.iterdir()] == [b"old"]

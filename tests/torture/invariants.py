"""What holds of a run folder after every fault, whatever the fault was."""

import os
import re
import signal
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from eri.errors import EriError
from eri.files import LOCK_FILE, STAGING_PREFIX, TEMPORARY_PREFIX
from eri.formats.header import read_header
from eri.run import checkpoints
from tests.torture.sessions import Ended
from tests.torture.workload import SAVE_EVERY, logged_steps

__all__ = ["Seen", "assert_invariants", "assert_message", "newest_step"]

CHECKPOINT = re.compile(r"checkpoint-(\d{6,})")
SAVED = re.compile(r"^saved +checkpoint-(\d{6,})$", re.MULTILINE)
ERRORS = range(2, 10)  # exit codes of errors that a person can mend
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
WIDTH = 200  # columns of a message; problems may be many lines


@dataclass(frozen=True)
class Seen:
    """What a run had reached when it was last looked at."""

    step: int = 0
    finished: bytes | None = None  # the finished adapter


def assert_invariants(
    run: Path,
    ended: Ended | None = None,
    *,
    before: Seen | None = None,
    save_every: int = SAVE_EVERY,
    killed: bool | None = None,
) -> Seen:
    """Assert that nothing in a run folder is torn, lost or left over.

    Args:
        run: the output folder; it need not exist.
        ended: the session that wrote last, for what it said.
        before: what this function returned before that session.
        save_every: steps between two checkpoints.
        killed: whether it was ended without a chance to clean up; None: its code says so.

    Returns:
        What the run has reached now.
    """
    if killed is None:
        killed = ended is not None and ended.code < 0
    _nothing_is_torn(run)  # I2
    step = newest_step(run)
    finished = run / f"{run.name}.safetensors"
    now = Seen(step, finished.read_bytes() if finished.exists() else None)
    if before is not None:
        assert now.step >= before.step, f"step {before.step} was saved, {now.step} is left"  # I3
    debris = [path for path in run.rglob("*") if _is_debris(path) and not _is_debris(path.parent)]
    assert len(debris) <= (1 if killed else 0), f"left behind: {debris}"  # I7
    if killed is not True or ended is not None:
        reached = max(logged_steps(run), default=0)
        assert reached - step <= save_every, f"{reached - step} steps were lost"  # I4
    _modes_follow_the_umask(run)  # I10
    if ended is not None:
        _assert_said(ended, now, before)
    return now


def _assert_said(ended: Ended, now: Seen, before: Seen | None) -> None:
    """What a session said and how it ended go with what it left."""
    said = [int(step) for step in SAVED.findall(ended.out)]
    assert max(said, default=0) <= now.step, f"'saved' {max(said)}, {now.step} is there"  # I1
    assert ended.code != 1, f"a bug:\n{ended.err}"
    if ended.code in ERRORS:
        assert_message(ended.err)  # I8
    if ended.code == 0:
        assert now.finished is not None, "exit 0 without a finished adapter"  # I6
    elif ended.code > 0 and before is not None:
        assert now.finished == before.finished, f"exit {ended.code} with a finished adapter"


def newest_step(run: Path) -> int:
    """The step of a run's newest checkpoint that is sound; 0 of none."""
    found = checkpoints.newest(run)
    return 0 if found is None else found.step


def assert_message(err: str) -> None:
    """One line that says what is wrong, its problems, one hint; printable, and no traceback."""
    lines = err.splitlines()
    heads = [number for number, line in enumerate(lines) if line.startswith("eri: error: ")]
    assert len(heads) == 1, f"not one message:\n{err}"
    message = lines[heads[0] :]
    assert all(line.startswith(("  ", "hint: ")) for line in message[1:]), err
    assert sum(line.startswith("hint: ") for line in message) <= 1, err
    assert "Traceback" not in err, err
    assert all(line.isprintable() for line in lines), repr(err)


def _nothing_is_torn(run: Path) -> None:
    """Every checkpoint and every safetensors file that is not in a staging folder is whole."""
    problems = list(_torn(run))
    assert not problems, problems


def _torn(run: Path) -> Iterator[str]:
    for path in run.glob("checkpoint-*"):
        if not CHECKPOINT.fullmatch(path.name):
            continue
        try:
            checkpoints.read(path)
        except EriError as error:
            yield f"{error}: {error.problems}"
    for path in run.rglob("*.safetensors"):
        if any(part.startswith(STAGING_PREFIX) for part in path.relative_to(run).parts):
            continue
        try:
            read_header(path)
        except EriError as error:
            yield str(error)


def _is_debris(path: Path) -> bool:
    return path.name.startswith((STAGING_PREFIX, TEMPORARY_PREFIX))


def _modes_follow_the_umask(run: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    for path in (run, *run.rglob("*")):
        if not path.exists() or any(map(_is_debris, (path, *path.parents))):
            continue
        mode = stat.S_IMODE(path.stat().st_mode)
        allowed = (0o777 if path.is_dir() else 0o666) & ~umask
        assert mode == allowed, f"{path.name}: mode {mode:o}, not {allowed:o}"
        assert path.stat().st_uid == os.getuid(), f"{path.name} belongs to another user"
        assert not path.is_symlink(), f"{path.name} is a link"
    assert not (run / LOCK_FILE).is_symlink()

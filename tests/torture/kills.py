"""SIGKILL at random moments of every kind of write: what was there, or what came, is whole.

Each case kills as often as it is told, looks after each kill, and counts. Tests run some dozens of
kills, scripts/torture hundreds.
"""

import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from eri.errors import EriError
from eri.files import STAGING_PREFIX, TEMPORARY_PREFIX, sha256, sweep_staging
from eri.formats.adapter_file import Dialect, read_adapter
from eri.run.adapter_files import layers_in
from tests.torture.invariants import Seen, assert_invariants
from tests.torture.sessions import Ended, ForkServer, Session
from tests.torture.victims import is_whole
from tests.torture.workload import STEPS, Workload, logged_steps

__all__ = ["Kills", "caching", "checkpointing", "exporting", "replacing", "stopping", "training"]

VICTIMS = "tests.torture.victims"
Begin = Callable[[int], Session]
"""The number of a session of a run to the session, begun."""


@dataclass
class Kills:
    """What came of some kills; each of them left everything whole, or there is no result."""

    kills: int = 0
    in_a_write: int = 0  # of these, left something half-written under a temporary name
    finished: int = 0  # writes that were reported as done


def replacing(server: ForkServer, folder: Path, *, kills: int, size: int, seed: int = 0) -> Kills:
    """K1: one file of random bytes, written anew in a loop."""
    draw, path, counted = random.Random(seed), folder / "payload.bin", Kills()
    for _ in range(kills):
        session = server.start(
            folder=folder / "said", hook=f"{VICTIMS}:replace_forever", given=[str(path), size]
        )
        ended = _kill(session, draw, within=size / 1e8)
        assert path.exists() or "saved" not in ended.out, "a file that was written is not there"
        assert not path.exists() or is_whole(path), "a file is torn"
        _count(counted, ended, folder)
    return counted


def checkpointing(server: ForkServer, folder: Path, *, kills: int, seed: int = 0) -> Kills:
    """K2: checkpoints saved and pruned in a loop; each session goes on from the newest."""
    draw, run, counted = random.Random(seed), folder / "run", Kills()
    run.mkdir()
    seen = Seen()
    for _ in range(kills):
        session = server.start(
            folder=folder / "said", hook=f"{VICTIMS}:save_forever", given=[str(run)]
        )
        ended = _kill(session, draw, within=0.15)
        seen = assert_invariants(run, ended, before=seen)
        for part in (run, run / "adapters"):
            if part.is_dir():
                _count(counted, None, part)
        counted.kills += 1
        counted.finished += ended.out.count("saved")
    return counted


def exporting(
    server: ForkServer, folder: Path, source: Path, *, kills: int, seed: int = 0
) -> Kills:
    """K4: an adapter exported over the same file in a loop; the source stays what it is."""
    draw, counted = random.Random(seed), Kills()
    output, before = folder / "exported.safetensors", sha256(source)
    dialect: Dialect = "kohya"
    for _ in range(kills):
        session = server.start(
            folder=folder / "said",
            hook=f"{VICTIMS}:export_forever",
            given=[str(source), str(output), dialect],
        )
        ended = _kill(session, draw, within=1.5)
        assert sha256(source) == before, "the source has changed"
        assert output.exists() or "saved" not in ended.out, "an export is gone"
        if output.exists():
            assert read_adapter(output, layers_in(output)).pairs, "an export is torn"
        _count(counted, ended, folder)
    return counted


def caching(
    server: ForkServer, workload: Workload, whole: Path, *, kills: int, seed: int = 0
) -> Kills:
    """K4: images and texts encoded into an empty cache; what is in it is what another run wrote.

    Args:
        server: forks the sessions.
        workload: that nobody trained; its config is trained for as long as nobody kills it.
        whole: the cache that a run filled without a fault.
        kills: how many, each while the cache grew.
        seed: of their moments.
    """
    draw, counted = random.Random(seed), Kills()
    cache = workload.folder / "cache"
    expected = _entries(whole)
    for _ in range(kills):
        shutil.rmtree(cache, ignore_errors=True)
        session = server.start(
            *("train", workload.config, "--set", "train.steps=1000"),  # it never ends by itself
            folder=workload.folder / "said",
            env={"ERI_CACHE": str(cache)},
        )
        least = draw.randint(1, len(expected))
        assert session.wait_for(lambda: len(_entries(cache)) >= least), session.err  # noqa: B023
        time.sleep(draw.uniform(0, 0.02))
        session.kill()
        ended = session.wait()
        for name, digest in _entries(cache).items():
            assert expected.get(name, digest) == digest, f"{name} in the cache is torn"
        assert_invariants(workload.run, ended)
        counted.kills += 1
    return counted


def training(
    workload: Workload, begin: Begin, *, kills: int, seed: int, steps: int = STEPS
) -> Kills:
    """K3: a whole run, killed at random moments of its training until the last session may end.

    Args:
        workload: that nobody trained.
        begin: begins its sessions.
        kills: how many.
        seed: of their moments.
        steps: of the workload.
    """
    draw, seen, counted = random.Random(seed), Seen(), Kills()
    for number in range(kills):
        share = (steps - seen.step) // (kills - number + 1)  # the rest is for later kills
        target = seen.step + draw.randint(1, max(share, 1))
        session = begin(number)
        grew = session.wait_for(lambda least=target: _last_step(workload.run) >= least)
        assert grew, f"the session ended by itself:\n{session.out}{session.err}"
        time.sleep(draw.uniform(0, 0.2))
        session.kill()
        ended = session.wait()
        assert ended.code == -signal.SIGKILL, "the kill came too late"
        seen = assert_invariants(workload.run, ended, before=seen)
        counted.kills += 1
        counted.finished += ended.out.count("saved ")
        counted.in_a_write += any(map(_debris, (workload.run, workload.run / "adapters")))
    ended = begin(kills).wait()
    assert ended.code == 0, ended.err
    assert_invariants(workload.run, ended, before=seen)
    return counted


def stopping(workload: Workload, begin: Begin, *, stops: int, seed: int) -> Kills:
    """S1: a whole run, asked to stop at random moments; no step that was done is lost.

    Args:
        workload: that nobody trained.
        begin: begins its sessions.
        stops: how many, by SIGTERM and SIGINT in turn.
        seed: of their moments.
    """
    draw, seen, counted = random.Random(seed), Seen(), Kills()
    for number in range(stops):
        asked = (signal.SIGTERM, signal.SIGINT)[number % 2]
        target = seen.step + draw.randint(1, (STEPS - seen.step) // (stops - number + 1))
        session = begin(number)
        grew = session.wait_for(lambda least=target: _last_step(workload.run) >= least)
        assert grew, f"the session ended by itself:\n{session.out}{session.err}"
        time.sleep(draw.uniform(0, 0.2))
        session.kill(asked)
        ended = session.wait(patience=20)
        assert ended.code == 128 + asked, ended.err
        seen = assert_invariants(workload.run, ended, before=seen)
        assert seen.step == _last_step(workload.run), "a step that was done is not saved"
        counted.kills += 1
        counted.finished += ended.out.count("saved ")
    ended = begin(stops).wait()
    assert ended.code == 0, ended.err
    assert_invariants(workload.run, ended, before=seen)
    return counted


def _kill(session: Session, draw: random.Random, within: float) -> Ended:
    """Kill a victim some time after it began to write, or has written once or twice."""
    least = draw.randint(0, 2)
    begun = session.wait_for(
        lambda: "ready" in session.out and session.out.count("saved ") >= least
    )
    assert begun, session.err
    time.sleep(draw.uniform(0, within))
    session.kill()
    ended = session.wait()
    assert ended.code == -signal.SIGKILL, ended.err
    assert "wrong" not in ended.out, "what was resumed is not what was saved"
    return ended


def _count(counted: Kills, ended: Ended | None, folder: Path) -> None:
    """Count what a kill left in a folder, and sweep it as the next start of a run does."""
    left = _debris(folder)
    assert len(left) <= 1, f"left behind: {left}"
    counted.in_a_write += len(left)
    sweep_staging(folder)
    assert not _debris(folder)
    if ended is not None:
        counted.kills += 1
        counted.finished += ended.out.count("saved ")


def _debris(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    prefixes = (STAGING_PREFIX, TEMPORARY_PREFIX)
    return [path for path in folder.iterdir() if path.name.startswith(prefixes)]


def _entries(cache: Path) -> dict[str, str]:
    """The digest of each image's and text's entry in a cache; none that is still being written."""
    found = {}
    for path in (*cache.rglob("*.latent"), *cache.rglob("*.text")):
        try:
            found[path.relative_to(cache).as_posix()] = sha256(path)
        except EriError:  # it was renamed meanwhile
            continue
    return found


def _last_step(run: Path) -> int:
    return max(logged_steps(run), default=0)

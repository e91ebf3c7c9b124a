"""`scripts/torture`: the torture suite for as long as there is time, and a table of the result.

Each row is a case of the tests with more kills or more broken files. A row ends at its goal, at its
share of the time, or at the first thing that is not as promised, which ends the whole with code 1.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

# before anything imports torch or transformers; child processes inherit them
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_OFFLINE": "1",
}

import torch

from eri import __version__
from tests.tiny import save_sd15
from tests.torture import kills
from tests.torture.chunks import CHUNK, fuzz_chunk
from tests.torture.sessions import ForkServer, Session, start
from tests.torture.workload import Workload, digest

FRESH_EVERY = 4  # of the killed runs, one is of fresh Pythons; the others are forked


@dataclass
class Row:
    """One case: what is counted, how often it is wanted, and its share of the time."""

    name: str
    what: str  # is counted
    goal: int
    share: float
    work: Callable[["Row"], None] = field(repr=False)  # once, or a chunk; adds to `done`
    done: int = 0
    kills: int = 0
    exact: int = 0  # resumes whose end is bit by bit the same
    outside: list[str] = field(default_factory=list)  # what is not as promised
    seconds: float = 0.0


class Bench:
    """The workload, a run of it that nobody disturbed, and a server that forks sessions."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed, self.number = folder, seed, 0
        self.server = ForkServer().__enter__()
        model = save_sd15(folder / "sd15")
        os.environ["ERI_CACHE"] = str(folder / "cache")
        self.straight = Workload.make(folder / "straight", model)
        ended = self._begin(self.straight, 0)(0).wait()
        if ended.code:
            raise RuntimeError(ended.err)
        self.digest = digest(self.straight.run)

    def close(self) -> None:
        """End the server."""
        self.server.__exit__()

    @contextmanager
    def place(self) -> Iterator[Path]:
        """A new folder, gone afterwards."""
        self.number += 1
        folder = self.folder / str(self.number)
        folder.mkdir()
        yield folder
        shutil.rmtree(folder)

    def run(self, row: Row, ways: Callable[[Workload, kills.Begin, int], kills.Kills]) -> None:
        """A whole run with faults, compared with the one without."""
        with self.place() as folder:
            workload = Workload.make(
                folder, self.straight.model, images=self.straight.folder / "photos"
            )
            done = ways(workload, self._begin(workload, row.done), self.seed + row.done)
            row.kills += done.kills
            row.done += 1
            if digest(workload.run) == self.digest:
                row.exact += done.kills
            else:
                row.outside.append(f"run {row.done} ended with other numbers")

    def writes(self, row: Row, case: Callable[..., kills.Kills], **arguments: object) -> None:
        """Some dozens of kills of one kind of write."""
        with self.place() as folder:
            done = case(self.server, folder, **arguments, seed=self.seed + row.done)
            row.kills += done.kills
            row.done += done.kills

    def _begin(self, workload: Workload, number: int) -> kills.Begin:
        def begin(session: int) -> Session:
            folder = workload.folder / f"session-{session}"
            fresh = number % FRESH_EVERY == FRESH_EVERY - 1
            return (start if fresh else self.server.start)("train", workload.config, folder=folder)

        return begin


def fuzzing(row: Row, name: str, seed: int, jobs: int) -> None:
    """A chunk of broken files for each core."""
    chunk = CHUNK[name]
    starts = [row.done + index * chunk for index in range(jobs)]
    context = get_context("spawn")  # a decoder that crashes takes its process with it
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for future in as_completed(
            [pool.submit(fuzz_chunk, name, chunk, seed, start) for start in starts]
        ):
            cases, outside = future.result()
            row.done += cases
            row.outside += outside


def rows(bench: Bench, jobs: int) -> list[Row]:
    """What is tortured, in order."""
    source, seed = bench.straight.adapter, bench.seed
    replacing = partial(bench.writes, case=kills.replacing, kills=25, size=64_000_000)
    checkpoints = partial(bench.writes, case=kills.checkpointing, kills=50)
    exports = partial(bench.writes, case=kills.exporting, source=source, kills=10)
    broken = ("headers", 3_000_000), ("yaml", 500_000), ("images", 1_000_000)
    killed = partial(bench.run, ways=lambda w, b, s: kills.training(w, b, kills=3, seed=s))
    stopped = partial(bench.run, ways=lambda w, b, s: kills.stopping(w, b, stops=4, seed=s))
    return [
        Row("K3 SIGKILL in training, resumed until done", "runs", 20, 0.28, killed),
        Row("S1 SIGTERM or SIGINT in training, resumed", "runs", 10, 0.12, stopped),
        Row("K1 SIGKILL while a 64 MB file is replaced", "kills", 500, 0.12, replacing),
        Row("K2 SIGKILL while checkpoints are saved and pruned", "kills", 500, 0.12, checkpoints),
        Row("K4 SIGKILL while an adapter is exported", "kills", 200, 0.12, exports),
        *(
            Row(f"F  broken {kind}", "files", goal, 0.08, _fuzzer(kind, seed, jobs))
            for kind, goal in broken
        ),
    ]


def _fuzzer(kind: str, seed: int, jobs: int) -> Callable[[Row], None]:
    return partial(fuzzing, name=f"fuzz_{kind}", seed=seed, jobs=jobs)


def torture(row: Row, seconds: float) -> None:
    """Work on a row until its goal, its time, or the first thing that is not as promised."""
    began = time.monotonic()
    while row.done < row.goal and not row.outside and row.seconds < seconds:
        try:
            row.work(row)
        except Exception:  # noqa: BLE001 - whatever it is, it is what is looked for
            row.outside.append(traceback.format_exc())
        row.seconds = time.monotonic() - began


def table(found: Sequence[Row]) -> str:
    """The rows for people."""
    lines = [
        "| case | done | kills | resumed bit by bit | outside the contract | time |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for row in found:
        exact = row.exact if row.what == "runs" else "–"
        killed = row.kills if row.what != "files" else "–"
        lines.append(
            f"| {row.name} | {row.done:,} of {row.goal:,} {row.what} | {killed} | {exact} | "
            f"{len(row.outside)} | {row.seconds:.0f} s |"
        )
    return "\n".join(lines)


def main() -> int:
    """Read the command line, torture, tell."""
    parser = argparse.ArgumentParser(prog="scripts/torture", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="for all of it; 60")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random; 0")
    parser.add_argument("--json", type=Path, help="a file for the result")
    parser.add_argument("--only", default="", help="begin of the rows' names, such as K3")
    options = parser.parse_args()
    torch.set_num_threads(1)
    jobs = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        bench = Bench(Path(folder), options.seed)
        try:
            found = [row for row in rows(bench, jobs) if row.name.startswith(options.only)]
            shares = sum(row.share for row in found) or 1.0
            for row in found:
                torture(row, 60 * options.minutes * row.share / shares)
                print(f"{row.name}: {row.done:,} {row.what}, {row.seconds:.0f} s", flush=True)
        finally:
            bench.close()
    print(f"\n{table(found)}")
    outside = [problem for row in found for problem in row.outside]
    print("\n".join(["", *outside]) if outside else "\nnothing was outside the contract")
    if options.json:
        options.json.write_text(json.dumps(result(found, options.minutes, options.seed), indent=2))
    return 1 if outside or not found else 0


def result(found: Sequence[Row], minutes: float, seed: int) -> dict[str, object]:
    """The rows for programs."""
    told = [{key: value for key, value in vars(row).items() if key != "work"} for row in found]
    versions = {"eri": __version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return {"minutes": minutes, "seed": seed, "machine": machine, **versions, "rows": told}


if __name__ == "__main__":
    sys.exit(main())

"""`scripts/bench step`: samples a second of a training step, of eri and of others, in one table.

Each case runs in a process of its own. With several rounds the processes of a batch size live side
by side and take turns, A B A B, so that a card that gets warm is warm for all; those that do not
fit beside the others run alone afterwards.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Self

from scripts.benchmark.families import FAMILIES, family_of

ROOT = Path(__file__).parents[2]
PROFILED = {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}  # for profiles of CUDA graphs
ALIKE = 0.02  # share by which 16-bit nets with the same weights may differ in what they say
LIMIT = 300  # seconds after which a process that does not answer is ended


@dataclass
class Row:
    """What is known of a case at a batch size."""

    family: str
    case: str
    batch: int
    failed: str | None = None
    seconds_per_step: list[float] = field(default_factory=list)  # of each window
    seconds: dict[str, float] = field(default_factory=dict)  # to the first step, and to full speed
    peak_gib: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def milliseconds(self) -> float:
        """Of a step, the median of the windows."""
        return 1e3 * median(self.seconds_per_step)

    @property
    def samples_per_second(self) -> float:
        """At the median."""
        return 1e3 * self.batch / self.milliseconds


class Process:
    """A case in a process; see `scripts.benchmark.worker`."""

    def __init__(self, row: Row, settings: Mapping[str, Any]) -> None:
        self.row = row
        self.ended = False
        self.errors = tempfile.TemporaryFile("w+")
        command = [sys.executable, "-m", "scripts.benchmark.worker"]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | PROFILED,
        )
        self.settings = dict(settings, spawned=time.time())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # its input ends, and so does it
        self.errors.close()

    def start(self) -> bool:
        """Build and warm up; whether that went well."""
        said = self._ask(self.settings)
        self.row.seconds, self.row.peak_gib = said.get("seconds", {}), said.get("peak_gib")
        return self.row.failed is None

    def window(self, steps: int) -> None:
        """Time some steps."""
        if self.row.failed is None:
            said = self._ask({"do": "window", "steps": steps})
            if self.row.failed is None:
                self.row.seconds_per_step.append(said["seconds_per_step"])

    def look(self, *, shapes: bool) -> None:
        """Look into a step."""
        if self.row.failed is None:
            asked = {"milliseconds": self.row.milliseconds, "shapes": shapes}
            said = self._ask({"do": "details", **asked})
            if self.row.failed is not None:  # the times stand all the same
                self.row.details = {"notes": [f"details: {self.row.failed}"]}
                self.row.failed = None
                self.ended = True
                return
            self.row.details = said
            peaks = (self.row.peak_gib, self.row.details.get("steady_gib"))
            self.row.peak_gib = max((p for p in peaks if p is not None), default=None)

    def facts(self) -> dict[str, str]:
        """What is measured on."""
        return {} if self.row.failed or self.ended else self._ask({"do": "facts"})

    def _ask(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Ask, and wait for the answer; a process that gives none has failed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"limit": LIMIT, **asked}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        said = json.loads(line) if line else {"failed": self._last_words()}
        if "failed" in said:
            self.row.failed = said["failed"]
        return said

    def _last_words(self) -> str:
        self.process.wait()
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()]
        if any(line.startswith("Timeout (") for line in lines):
            return f"no answer in {LIMIT} s"
        return f"ended with {self.process.returncode}: {lines[-1] if lines else 'no word'}"


def run(options: argparse.Namespace) -> int:
    """Measure all cases and print the table; 1 if there is not one number."""
    rows: list[Row] = []
    facts: dict[str, str] = {}
    for family in options.family:
        for batch in options.batch:
            group = [Row(family, case, batch) for case in options.cases]
            rows += group
            for row in _measure(group, options, facts):
                print(_line(row, options), file=sys.stderr, flush=True)
    print(report(rows, facts, options))
    if options.json:
        _save(options.json, rows, facts, options)
    return 0 if any(row.failed is None for row in rows) else 1


def _measure(group: Sequence[Row], options: argparse.Namespace, facts: dict[str, str]) -> list[Row]:
    """Fill the rows of a batch size; facts too, if they are not known."""
    together = options.rounds > 1
    alone: list[Row] = [] if together else list(group)
    if together:
        _side_by_side(group, options, facts)
        alone = [row for row in group if row.failed and "memory" in row.failed]
    for row in alone:
        row.failed, row.seconds_per_step = None, []
        _side_by_side([row], options, facts)
    return list(group)


def _side_by_side(rows: Sequence[Row], options: argparse.Namespace, facts: dict[str, str]) -> None:
    processes: list[Process] = []
    try:
        for row in rows:
            processes.append(Process(row, _settings(row, options)))
            processes[-1].start()
        for _ in range(options.rounds):
            for process in processes:
                process.window(options.steps)
        for process in processes:
            process.look(shapes=options.shapes)
            facts.update(facts or process.facts())
    finally:
        for process in processes:
            process.__exit__()


def _settings(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    names = ("tiny", "device", "dtype", "cap", "kohya", "onetrainer")
    return {**{name: getattr(options, name) for name in names}, **_identity(row)}


def _identity(row: Row) -> dict[str, Any]:
    return {"family": row.family, "case": row.case, "batch": row.batch}


# ------------------------------------------------------------------------------------- the table

HEAD = (
    f"{'case':<33}{'batch':>6}{'/s':>8}{'ms':>9}{'peak':>7}{'then':>7}{'kernels':>9}"
    f"{'GB':>7}{'first':>7}{'warm':>7}{'MFU':>7}{'floor':>7}"
)
LEGEND = """\
/s samples a second; ms of a step, median of the windows; peak GiB reserved from the start of the
process, then after the warm-up; kernels launched in a step; GB moved for a sample by the operations
of an eager step, read and written; first: seconds from the start of the process to the end of its
first step; warm: to full speed; MFU: TFLOP that a step needs, without recomputation, of {peak};
floor: share of the least time that an H200 needs."""


def report(rows: Sequence[Row], facts: Mapping[str, str], options: argparse.Namespace) -> str:
    """The table, what it was measured on, and what should be known of it."""
    lines = [f"{name}: {fact}" for name, fact in facts.items()]
    lines += ["", f"{options.dtype}, rank 16 on all linear layers of the transformers, forward, "]
    lines[-1] += f"backward, clip, AdamW; {options.rounds} x {options.steps} steps"
    for family in options.family:
        side = 8 * family_of(family, tiny=options.tiny).side
        lines += ["", f"{family}{' (tiny)' if options.tiny else ''} {side}²", HEAD]
        mine = [row for row in rows if row.family == family]
        lines += [_line(row, options) for row in mine]
        lines += _warnings(mine)
    lines += ["", LEGEND.format(peak=f"{options.peak:g} TFLOP/s")]
    if options.breakdown or options.shapes:
        lines += _insides(rows, options)
    return "\n".join(lines)


def _line(row: Row, options: argparse.Namespace) -> str:
    start = f"{row.case:<33}{row.batch:>6}"
    if row.failed:
        return f"{start}  failed: {row.failed}"[:120]
    family = family_of(row.family, tiny=options.tiny)
    mfu = floor = None
    if family.teraflops is not None and family.floor_ms is not None:
        mfu = family.teraflops * row.samples_per_second / options.peak
        floor = family.floor_ms * row.samples_per_second / 1e3
    cells = [
        _cell(row.samples_per_second, 8, ".2f"),
        _cell(row.milliseconds, 9, ".2f"),
        _cell(row.peak_gib, 7, ".2f"),
        _cell(row.details.get("steady_gib"), 7, ".2f"),
        _cell(row.details.get("launches"), 9, "d"),
        _cell(row.details.get("gb_per_sample"), 7, ".1f"),
        _cell(row.seconds.get("first_step"), 7, ".1f"),
        _cell(row.seconds.get("warm"), 7, ".1f"),
        _cell(mfu, 7, ".1%"),
        _cell(floor, 7, ".1%"),
    ]
    return start + "".join(cells)


def _cell(value: float | None, width: int, kind: str) -> str:
    return f"{'-' if value is None else format(value, kind):>{width}}"


def _warnings(rows: Sequence[Row]) -> list[str]:
    """What makes a row doubtful."""
    lines = []
    for row in rows:
        std = row.details.get("prediction_std")
        if std is not None and not 1e-3 < std < 1e3:
            lines.append(f"{row.case}: a prediction of deviation {std:g}: its time says nothing")
        failures = [f"failed: {row.failed}"] if row.failed else []
        lines += [f"{row.case}: {note}" for note in (*failures, *row.details.get("notes", ()))]
    first = min((row.batch for row in rows), default=0)  # other batches are other samples
    deviations = [row.details.get("prediction_std") for row in rows if row.batch == first]
    stds = {std for std in deviations if std is not None}
    if stds:
        alike = max(stds) < (1 + ALIKE) * min(stds)
        verdict = "" if alike else ": NOT the same net, compare nothing"
        lines.append(f"prediction's deviation: {min(stds):.4f} to {max(stds):.4f}{verdict}")
    return lines


def _insides(rows: Iterable[Row], options: argparse.Namespace) -> list[str]:
    lines = []
    for row in rows:
        for what, wanted in (("breakdown", options.breakdown), ("shapes", options.shapes)):
            if wanted and what in row.details:
                lines += ["", f"== {row.family} {row.case}, batch {row.batch}", row.details[what]]
    return lines


def _save(
    path: Path, rows: Iterable[Row], facts: Mapping[str, str], options: argparse.Namespace
) -> None:
    chosen = {name: str(value) for name, value in vars(options).items() if name != "run"}
    measured = []
    for row in rows:
        rate = None if row.failed else row.samples_per_second
        measured.append(asdict(row) | {"samples_per_second": rate})
    content = {"facts": facts, "options": chosen, "rows": measured}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `step`."""
    parser.add_argument("--family", nargs="+", choices=tuple(FAMILIES), default=["sdxl"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["eri", "eager", "graph"],
        help="eri[:option=value,...], eager, checkpointed, graph, compiled[-in-parts], "
        "kohya[-checkpointed|-bf16], onetrainer[-checkpointed|-compiled]",
    )
    parser.add_argument("--rounds", type=int, default=1, help="windows of each case, in turns")
    parser.add_argument("--steps", type=int, default=50, help="of a window")
    parser.add_argument("--cap", type=float, metavar="GIB", help="memory that a process may take")
    parser.add_argument("--peak", type=float, default=790.0, help="TFLOP/s that MFU is of")
    parser.add_argument("--breakdown", action="store_true", help="the kernels of a step")
    parser.add_argument("--shapes", action="store_true", help="the operations of an eager step")
    parser.add_argument("--kohya", type=Path, help="a checkout of kohya-ss/sd-scripts")
    parser.add_argument("--onetrainer", type=Path, help="a checkout of Nerogar/OneTrainer")

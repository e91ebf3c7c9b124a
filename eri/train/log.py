"""What a run tells people and programs: a progress bar or plain lines, and `log.jsonl`."""

import json
import math
from collections import deque
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from eri.files import atomic_write
from eri.printable import printable
from eri.train.step import Pending, StepNumbers

__all__ = ["Log", "cut", "say"]

PLAIN_LINES = 20  # of progress in a run whose output is not a terminal
LEAST_STEPS = 5  # that tell a speed; the first ones of a session are slower
LATEST_STEPS = 1000


class Log:
    """The voice of a run; a context manager around its work.

    Args:
        path: of `log.jsonl`, which gets one object a step.
        steps: in the whole run.
        step: reached already.
        console: where people read.
    """

    def __init__(self, path: Path, *, steps: int, step: int, console: Console) -> None:
        self.console = console
        self.waited = 0.0  # seconds, for samples to be there
        self._path = path
        self._steps = steps
        self._seconds = 0.0  # spent in steps, previews and saves left out
        self._done = 0  # steps of this session
        self._rates: deque[float] = deque(maxlen=LATEST_STEPS)
        self._bar = Progress(
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=steps, completed=step)

    def __enter__(self) -> Self:
        self._file = self._path.open("a", encoding="utf-8")
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        self._file.close()

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        say(self.console, text)

    def step(self, pending: Pending, numbers: StepNumbers, *, lr: float, seconds: float) -> None:
        """Record one finished step.

        Args:
            pending: the step.
            numbers: of its update.
            lr: the learning rate it used.
            seconds: it took.
        """
        step = pending.step
        self._seconds += seconds
        self._done += 1
        rate = numbers.samples / seconds
        self._rates.append(rate)
        record = {
            "step": step,
            "loss": numbers.loss,
            "grad_norm": numbers.grad_norm if math.isfinite(numbers.grad_norm) else None,
            "lr": lr,
            "images_per_second": round(rate, 3),
            "files": list(pending.files),
        }
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        left = (self._steps - step) * self._seconds / self._done
        line = (
            f"step {step}/{self._steps}  loss {numbers.loss:.4f}  {rate:.2f} images/s  "
            f"{_clock(left)} left{_memory()}"
        )
        self._bar.update(self._task, completed=step, description=line)
        if not self.console.is_terminal and self._is_told(step):
            self.say(line)

    @property
    def images_per_second(self) -> float | None:
        """The median over the latest steps of this session; None of too few to tell."""
        return median(self._rates) if self._done >= LEAST_STEPS else None

    def _is_told(self, step: int) -> bool:
        every = max(self._steps // PLAIN_LINES, 1)
        return step % every == 0 or step == self._steps or self._done == 1


def say(console: Console, text: str) -> None:
    """Print text as it is: no markup, and nothing in it that a terminal would obey."""
    for line in text.splitlines():
        console.print(Text(printable(line, limit=1000)), soft_wrap=True)


def cut(path: Path, step: int) -> None:
    """Drop the lines of `log.jsonl` after a step, which a resumed run will write again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _step_of(line) <= step]
    with atomic_write(path) as file:
        file.write("".join(f"{line}\n" for line in kept).encode())


def _step_of(line: str) -> float:
    """A line's step; a line torn by a crash belongs to no step that was saved."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _memory() -> str:
    """The most memory that this process has held: on its GPU, or on the host without one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return f"  {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB"
    status = Path("/proc/self/status")  # Linux has it
    if not status.exists():
        return ""
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return f"  {int(peak.split()[1]) / 2**20:.1f} GiB"

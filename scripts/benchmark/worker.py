"""A process that holds one case: it builds it, warms up, and then does what it is told.

It is told and answers in lines of JSON. First the settings; its answer comes when the case is warm.
Then `window` (time so many steps), `details` (look into a step), `facts`, or nothing more.
"""

import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

from scripts.benchmark import measure
from scripts.benchmark.cases import Case, Checkouts, build
from scripts.benchmark.families import family_of
from scripts.benchmark.machine import facts, synchronize
from scripts.benchmark.problem import Problem, batch_of, random_samples

GIB = 2**30
WARM_UP = 8  # steps: the first chooses kernels, others capture graphs
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main() -> None:
    """Serve until the standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    worker: Worker | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        faulthandler.dump_traceback_later(asked.pop("limit", 600), exit=True)
        try:
            if worker is None:
                worker = Worker(asked)
                said: dict[str, Any] = worker.start()
            else:
                said = getattr(worker, asked.pop("do"))(**asked)
        except Exception as error:  # noqa: BLE001 - whatever a trainer raises becomes its row
            said = {"failed": reason(error)}
        faulthandler.cancel_dump_traceback_later()
        _say(answers, said)
        if "failed" in said:
            return


def reason(error: BaseException) -> str:
    """What went wrong, in a line."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [""]
    kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
    return f"{kind}: {lines[0][:300]}"


def _say(answers: TextIO, said: dict[str, Any]) -> None:
    answers.write(json.dumps(said) + "\n")
    answers.flush()


class Worker:
    """One case and its measurements.

    Args:
        settings: `case`, `family`, `tiny`, `batch`, `device`, `dtype`, `cap` in GiB or None,
            `kohya` and `onetrainer` (paths or None), `spawned` (when the process was started).
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.device = torch.device(settings["device"])
        self.problem = Problem(
            family_of(settings["family"], tiny=settings["tiny"]),
            settings["batch"],
            self.device,
            DTYPES[settings["dtype"]],
        )

    def start(self) -> dict[str, Any]:
        """Build the case and run it until it is as fast as it gets."""
        settings = self.settings
        # eri takes cuDNN's own choice, in users' runs as well
        torch.backends.cudnn.benchmark = not settings["case"].startswith("eri")
        if self.device.type == "cuda" and settings["cap"]:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(settings["cap"] * GIB / total)
        paths = [settings[name] and Path(settings[name]) for name in ("kohya", "onetrainer")]
        self.case: Case = build(settings["case"], self.problem, Checkouts(*paths))
        synchronize(self.device)
        built = time.time()
        self._step()
        first = time.time()
        for _ in range(1 if settings["tiny"] else WARM_UP):
            self.case.step()
        synchronize(self.device)
        warm = time.time()
        peak = self._reserved()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = settings["spawned"]
        seconds = {"first_step": first - began, "first_step_of_model": first - built}
        return {"seconds": seconds | {"warm": warm - began}, "peak_gib": peak}

    def window(self, steps: int) -> dict[str, Any]:
        """Time some steps between two synchronisations."""
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.case.step()
        synchronize(self.device)
        return {"seconds_per_step": (time.perf_counter() - start) / steps}

    def details(self, milliseconds: float, shapes: bool) -> dict[str, Any]:
        """Memory since the warm-up, what a step consists of, and whether its numbers are numbers.

        Args:
            milliseconds: that a step takes.
            shapes: also which operations it takes, by shape.
        """
        found: dict[str, Any] = {"steady_gib": self._reserved()}
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            found["device_used_gib"] = (total - free) / GIB
        family = self.problem.family
        batch = batch_of(random_samples(family), 0, self.problem.batch)
        with attempted(found, "prediction"):
            prediction = self.case.prediction(batch)
            found["prediction_std"] = prediction.std().item()
        with attempted(found, "kernels"):
            kernels = measure.kernels_of(self.case.step, self.device)
            if self.device.type == "cuda":
                found["launches"] = measure.launches(kernels)
            found["breakdown"] = measure.breakdown(kernels, milliseconds)
        if not self.case.compiled:
            with attempted(found, "bytes"):
                self._count(found)
        if shapes:
            with attempted(found, "shapes"):
                found["shapes"] = measure.operations(self.case.eager_step, self.device)
        return found

    def facts(self) -> dict[str, Any]:
        """What is measured on."""
        return facts(self.device)

    def _count(self, found: dict[str, Any]) -> None:
        moved = measure.bytes_moved(self.case.eager_step)
        found["gb_per_sample"] = sum(moved.values()) / self.problem.batch / 1e9
        found["breakdown"] = f"{found.get('breakdown', '')}\n{measure.traffic(moved)}"

    def _step(self) -> None:
        self.case.step()
        synchronize(self.device)

    def _reserved(self) -> float | None:
        """The most memory that PyTorch had taken since it was last asked, graphs included, GiB."""
        return torch.cuda.max_memory_reserved() / GIB if self.device.type == "cuda" else None


@contextmanager
def attempted(found: dict[str, Any], what: str) -> Iterator[None]:
    """Whether a further measurement can be had decides nothing about the others."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a profiler fails in its own ways
        found.setdefault("notes", []).append(f"{what}: {reason(error)}")


Ask = Callable[..., dict[str, Any]]

if __name__ == "__main__":
    main()

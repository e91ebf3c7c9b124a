"""A whole run of eri: what its time goes into, and how much memory it takes.

Makes a full-size SDXL with random weights and a folder of photographs that are none, then runs
`eri train configs/sdxl.yaml` on them in a process of its own, once for each cap on the memory of
the GPU, and tells what it chose, how fast it was, and what it reserved, caching and previews
included. A second run of a folder finds the latents cached; `--again` shows that.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

SHAPES = ((1024, 1024), (1152, 896), (896, 1152), (1216, 832), (832, 1216), (1344, 768))
SHAPES += ((768, 1344), (1536, 640), (640, 1536))  # SDXL's
WARM = 40  # steps whose speed does not count: shapes are met and recorded in them
FIRST = re.compile(r"step 1/\d+ ")


@dataclass(frozen=True)
class Job:
    """What one run was like."""

    cap: float | None  # GiB
    code: int
    wall: float  # seconds, from the command to its end
    first_step: float | None  # seconds, from the command
    images_per_second: float | None  # median of the later steps
    steady: float | None  # mean of the later steps, all waiting between them included
    reserved: float | None  # GiB, the most that was
    lines: tuple[str, ...]  # of its output: plan, time, errors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `scripts/bench job`."""
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="where to work")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="of the images, up to 9")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--previews", type=int, default=250, help="steps between them; 0: none")
    parser.add_argument("--cap", type=float, nargs="*", default=[], help="GiB; a run for each")
    parser.add_argument("--again", action="store_true", help="once more, with what is cached")
    parser.add_argument("--set", nargs="*", default=[], help="further settings of eri train")


def run(options: argparse.Namespace) -> int:
    """Make model and images unless they are there, and measure."""
    folder = options.folder.absolute()
    model = folder / ("model-tiny" if options.tiny else "model")
    if not (model / "model_index.json").exists():
        make_model(model, options)
    data = folder / f"images-{options.images}-{options.shapes}"
    make_images(data, options.images, options.shapes)
    jobs = []
    for number, cap in enumerate(options.cap or [None]):
        for again in range(1 + options.again):
            name = f"{time.strftime('%H%M%S')}-{number}-{again}"
            jobs.append(measure(options, model, data, folder / name, cap))
            tell(jobs[-1])
    if options.json:
        options.json.write_text(json.dumps([asdict(job) for job in jobs], indent=1))
    return int(any(job.code for job in jobs))


def measure(
    options: argparse.Namespace, model: Path, data: Path, output: Path, cap: float | None
) -> Job:
    """Run `eri train` in a process of its own."""
    settings = {
        "model.path": model,
        "data": data,
        "output": output,
        "train.steps": options.steps,
        "save.every": max(options.previews, 250),
        "sample.every": options.previews,
    }
    if options.tiny:
        settings |= {"sample.steps": 2}
    peak = output.with_suffix(".peak")
    command = [sys.executable, "-m", "scripts.benchmark.capped", str(cap or 0), str(peak)]
    command += ["train", "configs/sdxl.yaml"]
    for setting in (*(f"{key}={value}" for key, value in settings.items()), *options.set):
        command += ["--set", setting]
    began, first, lines = time.perf_counter(), None, []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if FIRST.match(line):
                first = time.perf_counter() - began
            if not line.startswith("step "):
                lines.append(line.rstrip())
    wall = time.perf_counter() - began
    rates, steady = speeds(output / "log.jsonl")
    reserved = float(peak.read_text()) if peak.exists() else None
    return Job(cap, process.returncode, wall, first, rates, steady, reserved, tuple(lines))


def speeds(log: Path) -> tuple[float | None, float | None]:
    """Images a second of the later steps: the median, and the mean of all of them."""
    if not log.exists():
        return None, None
    records = [json.loads(line) for line in log.read_text().splitlines()]
    records = records[min(WARM, len(records) // 2) :]
    if not records:
        return None, None
    seconds = sum(len(one["files"]) / one["images_per_second"] for one in records)
    images = sum(len(one["files"]) for one in records)
    return median(one["images_per_second"] for one in records), images / seconds


def tell(job: Job) -> None:
    """Print a run."""
    shown = ("memory", "kernels", "time  ", "warning", "slower", "eri: error", "hint", "adapter")
    for line in job.lines:
        if line.startswith(shown):
            print(f"    {line}")
    cap = "no cap" if job.cap is None else f"cap {job.cap:g} GiB"
    numbers = {
        "s in all": job.wall,
        "s to the first step": job.first_step,
        "images/s": job.images_per_second,
        "images/s with all waiting": job.steady,
        "GiB reserved": job.reserved,
    }
    told = ", ".join(f"{value:.2f} {name}" for name, value in numbers.items() if value is not None)
    print(f"{cap}: exit {job.code}, {told}", flush=True)


def make_images(folder: Path, count: int, shapes: int) -> None:
    """Smooth noise as JPEGs, each with a caption."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    draws = np.random.default_rng(0)
    for number in range(count):
        size = SHAPES[number % shapes]
        small = draws.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:04}.jpg", quality=92)
        (folder / f"{number:04}.txt").write_text(f"a picture of number {number}, smooth noise")


def make_model(folder: Path, options: argparse.Namespace) -> None:
    """SDXL with random weights as a diffusers folder, full size or tiny."""
    from tests.families import save_sdxl

    if options.tiny:
        save_sdxl(folder)
        return
    from scripts.benchmark.whole_model import save_whole_sdxl

    save_whole_sdxl(folder, torch.device(options.device))

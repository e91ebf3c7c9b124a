"""Losses of eri and of diffusers with PEFT from the same adapter, samples, noises and timesteps.

`--model demo` is the bundled model and its images, where the loss falls; the others have random
weights at their published size, where only the difference says something. With `--compare A B` two
of eri's own ways are trained instead, and their adapters compared bit for bit.
"""

import argparse
import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from eri.run.micro_batch import Sample
from scripts.benchmark.cases import Case, parse
from scripts.benchmark.families import FAMILIES, Family, family_of
from scripts.benchmark.plot import plot
from scripts.benchmark.problem import Problem, batch_of, random_samples
from scripts.benchmark.worker import DTYPES

DEMO = Path(__file__).parents[2] / "eri" / "demo"
SMOOTH = 21  # steps that a point of a smoothed curve is the mean of
NAMES = {"eri": "eri", "eager": "diffusers + PEFT"}


def run(options: argparse.Namespace) -> int:
    """Train, print, plot."""
    family, samples = _what(options)
    if options.compare:
        return _compare(options, family, samples)
    content: dict[str, Any] = {}
    for dtype in options.dtypes:
        sides = {}
        for name in ("eri", "eager"):
            sides[name] = _train(name, _problem(options, family, dtype), samples, options)
        content[dtype] = _differences(*(sides[name] for name in ("eri", "eager")))
        content[dtype]["losses"] = {name: losses for name, (losses, _) in sides.items()}
        print(_sentence(dtype, content[dtype]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        panels = {
            f"{options.model}, {dtype}": {
                NAMES[name]: smoothed(losses) for name, losses in one["losses"].items()
            }
            for dtype, one in content.items()
        }
        plot(panels, options.plot, below=f"step; mean of {SMOOTH} losses")
    return 0


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of the losses around each step."""
    half = SMOOTH // 2
    windows = (losses[max(place - half, 0) : place + half + 1] for place in range(len(losses)))
    return [sum(window) / len(window) for window in windows]


Trained = tuple[list[float], dict[str, Tensor]]
"""The loss of each step, and the adapter after the last."""


def _train(name: str, problem: Problem, samples: list[Sample], options: Any) -> Trained:
    case = _build(name, problem, options.lr)
    losses = []
    for step in range(options.steps):
        losses.append(case.train_on(batch_of(samples, step, problem.batch)))
    matrices = case.matrices()
    del case
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return losses, matrices


def _build(name: str, problem: Problem, lr: float) -> Case:
    kind, chosen = parse(name)
    if kind == "eri":
        from scripts.benchmark.eri_case import EriCase

        return EriCase(problem, chosen, lr=lr, fresh=True)
    from scripts.benchmark.peers import eager

    return eager(problem, lr=lr, fresh=True)


def _problem(options: argparse.Namespace, family: Family, dtype: str) -> Problem:
    return Problem(family, options.batch, torch.device(options.device), DTYPES[dtype])


def _what(options: argparse.Namespace) -> tuple[Family, list[Sample]]:
    """The model and what it is trained on."""
    if options.model == "demo":
        return demo_family(), demo_samples()
    family = family_of(options.model, tiny=options.tiny)
    return family, random_samples(family)


def demo_family() -> Family:
    """The bundled model."""
    folder = DEMO / "model"
    config = json.loads((folder / "unet/config.json").read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if value is not None}
    return Family("sd15", kept, config["sample_size"], 192, folder=folder)


def demo_samples() -> list[Sample]:
    """The bundled images with their captions, encoded."""
    from eri.models import load_text, load_vae

    vae, text = load_vae(DEMO / "model"), load_text(DEMO / "model")
    samples = []
    for path in sorted((DEMO / "data").glob("*.png")):
        picture = Image.open(path).convert("RGB")
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float()
        pixels = pixels.view(1, picture.height, picture.width, 3).permute(0, 3, 1, 2)
        mean, std = vae.encode(pixels / 127.5 - 1)
        context, _ = text.encode([path.with_suffix(".txt").read_text(encoding="utf-8").strip()])
        samples.append(Sample(path.name, mean[0], std[0], context[0]))
    return samples


def _differences(mine: Trained, theirs: Trained) -> dict[str, float]:
    """How far two trainings are apart; losses relative to the mean of theirs."""
    level = sum(theirs[0]) / len(theirs[0])
    raw = [abs(a - b) / level for a, b in zip(mine[0], theirs[0], strict=True)]
    smooth = zip(smoothed(mine[0]), smoothed(theirs[0]), strict=True)
    apart = [abs(a - b) / level for a, b in smooth]
    between = sum((mine[1][n].flatten() - t.flatten()).square().sum() for n, t in theirs[1].items())
    size = sum(tensor.square().sum() for tensor in theirs[1].values())
    return {
        "largest_of_smoothed": max(apart),
        "mean_of_smoothed": sum(apart) / len(apart),
        "largest": max(raw),
        "adapters": float((torch.as_tensor(between) / size).sqrt()),
    }


def _sentence(dtype: str, one: dict[str, Any]) -> str:
    ends = {name: smoothed(losses) for name, losses in one["losses"].items()}
    fall = ", ".join(f"{NAMES[n]} {curve[0]:.4f} to {curve[-1]:.4f}" for n, curve in ends.items())
    return (
        f"{dtype}: {fall}; smoothed curves differ by {one['largest_of_smoothed']:.3%} at most, "
        f"{one['mean_of_smoothed']:.3%} in the mean; single losses by {one['largest']:.3%} at "
        f"most; the matrices at the end by {one['adapters']:.3%}"
    )


def _compare(options: argparse.Namespace, family: Family, samples: list[Sample]) -> int:
    """Whether two ways of training give the same bits."""
    same = True
    for dtype in options.dtypes:
        problem = _problem(options, family, dtype)
        first, second = (_train(name, problem, samples, options) for name in options.compare)
        unequal = [name for name, m in first[1].items() if not torch.equal(m, second[1][name])]
        found = _differences(first, second)
        pairs = enumerate(zip(first[0], second[0], strict=True), start=1)
        step = next((n for n, (one, other) in pairs if one != other), None)
        same = same and not unequal
        print(
            f"{dtype}, {options.steps} steps, {' and '.join(options.compare)}: "
            + (
                f"all {len(first[1])} matrices are equal bit for bit"
                if not unequal
                else f"{len(unequal)} of {len(first[1])} matrices differ, all together by "
                f"{found['adapters']:.2e}; the first loss that differs is of step {step}"
            )
        )
    return 0 if same else 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `curves`."""
    parser.add_argument("--model", choices=("demo", *FAMILIES), default="demo")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=["bf16", "fp16"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--plot", type=Path, metavar="PNG")
    parser.add_argument("--compare", nargs=2, metavar="CASE", help="as eri eri:graphs=off")

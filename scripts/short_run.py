"""A short training run through the command line, as a person would start it, and its adapter."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from eri.formats.adapter_file import LoRAPair, read_adapter
from eri.run.adapter_files import finished_adapter, layers_in
from eri.run.export import export

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "eri/demo/data"


@dataclass(frozen=True)
class Run:
    """A run that ended well, and what it said of the model's prediction and warned of."""

    folder: Path
    first_loss: float
    last_loss: float
    said: tuple[str, ...]


def short_run(model: Path, work: Path, steps: int, resolution: int, device: torch.device) -> Run:
    """Train on the bundled images.

    Args:
        model: the base model.
        work: a folder for the config, the cache and the run.
        steps: of training, one image each.
        resolution: of the images, in pixels.
        device: the CPU, or whatever `eri` finds.

    Raises:
        ValueError: it ended with another code than 0, or a loss is no number.
    """
    work.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": {"path": str(model)},
        "data": [{"path": str(IMAGES), "resolution": resolution}],
        "output": str(work / "run"),
        "adapter": {"rank": 8},
        "train": {"steps": steps, "batch_size": 1, "lr": 1e-3},
        "save": {"every": steps},
        "sample": {"every": 0},
    }
    config = work / "config.yaml"
    config.write_text(json.dumps(settings), "utf-8")  # JSON is YAML
    environment = os.environ | {"ERI_CACHE": str(work / "cache")}
    if device.type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "eri", "train", str(config)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = " ".join(done.stderr.split())[-300:]
        raise ValueError(f"eri train ended with {done.returncode}: {said}")
    log = (work / "run/log.jsonl").read_text("utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in log]
    if len(losses) != steps or not all(map(math.isfinite, losses)):
        raise ValueError(f"of {steps} steps {len(losses)} are in log.jsonl: {losses[-3:]}")
    told = [line.strip() for line in done.stdout.splitlines()]
    said = dict.fromkeys(line for line in told if line.startswith(("prediction", "warning")))
    return Run(work / "run", losses[0], losses[-1], tuple(said))


def export_both(run: Run, work: Path) -> list[Path]:
    """The run's adapter in the names of kohya and of diffusers, the same as the trained one.

    Raises:
        EriError: it cannot be written.
        ValueError: what is read back is not the trained one.
    """
    trained = pairs_in(finished_adapter(run.folder))
    files = []
    for dialect in ("kohya", "diffusers"):
        file = work / f"{dialect}.safetensors"
        export(run.folder, file, dialect=dialect, precision="fp16", overwrite=False)
        if not same(pairs_in(file), trained):
            raise ValueError(f"the adapter in {dialect}'s names is not the trained one")
        files.append(file)
    return files


def pairs_in(file: Path) -> dict[str, LoRAPair]:
    """An adapter by eri's names."""
    return dict(read_adapter(file, layers_in(file)).pairs)


def same(one: dict[str, LoRAPair], other: dict[str, LoRAPair]) -> bool:
    """Whether two adapters have the same modules, each with the same matrices and scale."""
    return one.keys() == other.keys() and all(
        torch.equal(pair.down, other[name].down)
        and torch.equal(pair.up, other[name].up)
        and math.isclose(pair.alpha, other[name].alpha, rel_tol=1e-3)
        for name, pair in one.items()
    )

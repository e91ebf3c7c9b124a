"""What makes the numbers of a run, and its settings with nothing left to be worked out."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from eri import __version__
from eri.config import Config, trajectory
from eri.run.base import BaseFacts
from eri.run.dataset import Images
from eri.run.plan import RunPlan
from eri.run.prediction import Choice
from eri.run.rates import device_name

__all__ = ["identity_of", "made_with", "resolved"]

PATHS = ("path", "model.vae", "model.text")  # keys, by their ends


def identity_of(
    config: Config, facts: BaseFacts, images: Images, plan: RunPlan
) -> dict[str, object]:
    """What made the numbers of a run: its settings, its model and its images."""
    # where the model and the images lie does not matter: their content is in here
    settings = {k: v for k, v in trajectory(config).items() if not k.endswith(PATHS)}
    identity = (
        settings
        | plan.choice.identity
        | {
            "model": " ".join(f"{part} {digest}" for part, digest in facts.hashes.items()),
            "images": images.train.fingerprint,
            "train.precision": str(plan.dtype).removeprefix("torch."),
        }
    )
    if config.train.schedule != "constant":
        identity["train.steps"] = plan.loop.steps  # the rate of every step depends on the last
    return json.loads(json.dumps(identity))


def made_with(device: torch.device) -> dict[str, object]:
    """What the numbers of a run are computed with; where it changes, their last bits may."""
    vectors = torch.backends.cpu.get_cpu_capability()  # their width decides the order of sums
    on_cpu = device.type == "cpu"
    return {
        "eri": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "safetensors": version("safetensors"),
        "threads": torch.get_num_threads(),
        "device": f"{platform.machine()} {vectors}" if on_cpu else device_name(device),
    }


def resolved(config: Config, plan: RunPlan, choice: Choice) -> Config:
    """The settings with every path and number worked out, so that they mean the same anywhere."""
    model = choice.settings(config.model)
    named = {name: getattr(model, name) for name in ("path", "vae", "text")}
    model = model.model_copy(
        update={
            name: str(Path(path).absolute())
            for name, path in named.items()
            if path is not None and path != "demo" and Path(path).exists()  # else a hub id
        }
    )
    data = tuple(
        source.model_copy(
            update={
                "path": source.path.absolute(),
                "validation": source.validation and source.validation.absolute(),
            }
        )
        for source in config.data
    )
    train = config.train
    if train.epochs is None:  # one of the two says how long
        train = train.model_copy(update={"steps": plan.loop.steps})
    output = config.output.absolute()
    update = {"model": model, "data": data, "output": output, "train": train}
    return config.model_copy(update=update)

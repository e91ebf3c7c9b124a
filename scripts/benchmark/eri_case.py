"""eri's own step, built as a run builds it; the one place that knows how.

Options: `lean=on|off` (hand-written backward passes; on a GPU on, where the two settings that plain
modules are for leave them), `graphs=on|off` (CUDA graphs; on a GPU on), `recompute=` what blocks
compute again, `micro=` samples of a micro-batch, `rank=` of the LoRA, and the settings of a run
`dropout=` in percent, `backend=auto|reference` and `deterministic=on|off`, the last two for the
whole process, from when the case is built.
"""

import json
import tempfile
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from eri.adapters import Adapter, attach
from eri.diffusion import NoiseSchedule
from eri.formats.unet_config import unet_config
from eri.formats.unet_names import to_diffusers
from eri.layers.backend import set_backend
from eri.models import UNet, load_unet
from eri.models.arrange import RECOMPUTE, arrange
from eri.models.spec import SD15, SDXL, build_spec
from eri.models.unet import UNetSpec
from eri.run.conditions import Conditions
from eri.run.device import set_arithmetic
from eri.run.micro_batch import Sample, SampleBatch
from eri.run.objective import Objective
from eri.train import Graphs, Step, TrainState, Workspace
from eri.train.step import Pending
from scripts.benchmark.families import RANK, Family, materialize, random_down, random_up
from scripts.benchmark.problem import (
    LR,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    Problem,
    batch_of,
    random_samples,
)

AHEAD = 2  # steps that the host may be ahead of the device, as in eri's training loop
SWITCH = ("on", "off")
OPTIONS = {"lean": SWITCH, "graphs": SWITCH, "recompute": RECOMPUTE, "deterministic": SWITCH}
OPTIONS |= {"backend": ("auto", "reference"), "micro": None, "rank": None, "dropout": None}


class EriCase:
    """eri's step.

    Args:
        problem: what to train on.
        options: see the module.
        lr: of every step.
        fresh: begin with the adapter of a new run, whose up matrices are zero.
    """

    compiled = False

    def __init__(
        self,
        problem: Problem,
        options: Mapping[str, str] | None = None,
        *,
        lr: float = LR,
        fresh: bool = False,
    ) -> None:
        options = checked(options or {})
        on_gpu = problem.device.type == "cuda"
        default = "on" if on_gpu else "off"
        backend, dropout = options.get("backend", "auto"), int(options.get("dropout", "0")) / 100
        set_backend("reference" if backend == "reference" else "auto")
        set_arithmetic(deterministic=options.get("deterministic") == "on")
        self.problem, self.lr = problem, lr
        self.micro = int(options.get("micro", problem.batch))
        self.unet = build_unet(problem).train()
        rank = int(options.get("rank", RANK))
        self.adapter = attach(self.unet, rank=rank, alpha=rank, dropout=dropout)
        fill(self.adapter, problem.device, fresh=fresh)
        plain = backend == "reference" or dropout > 0  # as `eri.run.fast_path.runs_lean`
        lean = options.get("lean", "off" if plain else default) == "on"
        if on_gpu or lean or "recompute" in options:
            arrange(self.unet, lean=lean, recompute=options.get("recompute", "nothing"))
        flat = self.adapter.flatten()
        self.state = TrainState(flat, scaling=problem.dtype == torch.float16)
        self.objective = Objective(self.unet, NoiseSchedule(), seed=problem.seed, drops=dropout > 0)
        workspace = Workspace(problem.device) if on_gpu else None
        most = None if options.get("graphs", default) == "on" else 0
        self.run = self._step(workspace, most)
        self.eager_run = self._step(workspace, 0)
        self.samples: list[Sample] = []
        self.running: deque[Pending] = deque()

    def step(self) -> None:
        """Train on the next batch; a loss that is told is two steps old, as in training."""
        self._next(self.run)

    def eager_step(self) -> None:
        """The same without a graph."""
        self._next(self.eager_run)

    def train_on(self, batch: SampleBatch) -> float:
        """Train on a batch and wait for its loss."""
        pending = self.run([batch], self.lr)
        self.state.step += 1
        return pending.result().loss

    @torch.no_grad()
    def prediction(self, batch: SampleBatch) -> Tensor:
        """What the net says of a batch."""
        given = self._drawn(batch)
        latents = given["mean"] + given["std"] * given["latent"]
        noisy = self.objective.schedule.add_noise(latents, given["noise"], given["timesteps"])
        told = Conditions(given["context"], given.get("pooled"), given.get("time_ids"))
        return self.unet(noisy.to(self.problem.dtype), given["timesteps"], *told).float()

    def gradients(self, batch: SampleBatch, scale: float = 1.0) -> dict[str, Tensor]:
        """The gradient of each matrix, float32 on the CPU; `scale` as of a loss scaler."""
        flat = self.state.flat
        flat.grad.zero_()
        (scale * self.objective(self._drawn(batch)).mean()).backward()
        found = self._named(flat.grad / scale)
        flat.grad.zero_()
        return found

    def matrices(self) -> dict[str, Tensor]:
        """The LoRA, float32 on the CPU."""
        return self._named(self.state.flat.master)

    def _next(self, run: Step) -> None:
        if not self.samples:
            self.samples = [on(sample, self.problem) for sample in random_samples_of(self.problem)]
        size = self.problem.batch
        whole = batch_of(self.samples, self.state.step, size)
        parts = [slice(start, start + self.micro) for start in range(0, size, self.micro)]
        batches = [SampleBatch(whole.samples[part], whole.numbers[part]) for part in parts]
        self.running.append(run(batches, self.lr))
        self.state.step += 1
        while len(self.running) > AHEAD:
            self.running.popleft().result()

    def _step(self, workspace: Workspace | None, most: int | None) -> Step:
        graphs = None
        if workspace is not None:
            graphs = Graphs(workspace) if most is None else Graphs(workspace, most)
        return Step(
            self.state,
            self.objective,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
            graphs=graphs,
        )

    def _drawn(self, batch: SampleBatch) -> dict[str, Tensor]:
        given = self.objective.draw(batch)
        return {name: tensor.to(self.problem.device) for name, tensor in given.items()}

    def _named(self, buffer: Tensor) -> dict[str, Tensor]:
        """What a buffer holds of each matrix, by the names of the other cases."""
        found = {}
        for name, view in self.state.flat.views(buffer).items():
            module, part = name.removesuffix(".weight").rsplit(".", 1)
            ending = {"lora_a": "down", "lora_b": "up"}[part]
            found[f"{to_diffusers(module)}.{ending}"] = view.detach().float().cpu().clone()
        return found


def checked(options: Mapping[str, str]) -> Mapping[str, str]:
    """Options of an `eri` case.

    Raises:
        ValueError: there is no such option, or it has no such value.
    """
    for name, value in options.items():
        if name not in OPTIONS:
            raise ValueError(f"eri has no option {name!r}; there are {', '.join(OPTIONS)}")
        allowed = OPTIONS[name]
        if allowed is not None and value not in allowed:
            raise ValueError(f"eri: {name}={value}: expected one of {', '.join(allowed)}")
        if allowed is None and not value.isdigit():
            raise ValueError(f"eri: {name}={value}: expected a number")
    return options


def build_unet(problem: Problem) -> UNet:
    """The U-Net, frozen, with the weights that every case has."""
    family = problem.family
    if family.folder is not None:
        return load_unet(family.folder, dtype=problem.dtype, device=problem.device)
    with torch.device("meta"):
        unet = UNet(spec_of(family))
    materialize(unet, problem.device, problem.dtype, to_diffusers)
    return unet


def spec_of(family: Family) -> UNetSpec:
    """What eri calls a family; of a tiny one it reads the config that diffusers writes."""
    if not family.tiny:
        return {"sd15": SD15, "sdxl": SDXL}[family.name]
    from diffusers import UNet2DConditionModel

    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        config = UNet2DConditionModel(**family.config).config
        text = json.dumps({"_class_name": "UNet2DConditionModel", **config}, default=list)
        (Path(folder) / "config.json").write_text(text)
        return build_spec(unet_config(Path(folder)))


@torch.no_grad()
def fill(adapter: Adapter, device: torch.device, *, fresh: bool) -> None:
    """Give the LoRA the matrices that every case has; a fresh one has up matrices of zero."""
    for name, layer in adapter.layers.items():
        module = to_diffusers(name)
        down, up = layer.lora_a.weight, layer.lora_b.weight
        down.copy_(random_down(module, tuple(down.shape), device))
        if not fresh:
            up.copy_(random_up(module, tuple(up.shape), device))


def random_samples_of(problem: Problem) -> list[Sample]:
    """What is trained on."""
    return random_samples(problem.family, problem.side)


def on(sample: Sample, problem: Problem) -> Sample:
    """A sample on the device, where training has it as well before its step begins."""
    names = ("mean", "std", "context", "pooled", "time_ids")
    tensors = {name: getattr(sample, name) for name in names}
    moved = {name: t.to(problem.device) for name, t in tensors.items() if t is not None}
    return replace(sample, **moved)

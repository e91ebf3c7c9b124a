"""One training, twice: with eri, and with diffusers' nets and noise, PEFT's layers and PyTorch.

Both loops begin with the same down matrices and see the same samples, noises and timesteps; apart
from these and from the names of the modules they share nothing.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp import GradScaler

from eri.adapters import attach
from eri.diffusion import NoiseSchedule
from eri.formats.unet_names import to_diffusers
from eri.models import load_unet
from eri.models.unet import UNetSpec
from eri.rng import generator, normal
from eri.run.objective import Objective, Sample, SampleBatch
from eri.train import OPTIMIZERS, TrainState, update

SHAPE = (4, 16, 8)  # smaller ones leave the norms of the deepest level a few numbers to divide by
RANK = 4
BATCH = 2
TIMESTEPS = 1000

Deltas = dict[str, Tensor]
"""ΔW of every adapted module, by its diffusers name."""


@dataclass(frozen=True)
class Settings:
    """What both loops are told, unless a control tells the reference something else."""

    prediction: str = "epsilon"
    zero_terminal_snr: bool = False
    seed: int = 0
    lr: float = 1e-3
    weight_decay: float = 0.1
    max_grad_norm: float | None = 1e-4  # below the norms that occur, so that it always clips
    # Of the reference alone:
    later: int = 0  # timesteps that it is off by
    pooled: float = 1.0  # what its pooled texts are multiplied by
    size_ids: tuple[int, ...] = (0, 1, 2, 3, 4, 5)  # their order


def train_here(folder: Path, settings: Settings, steps: Collection[int]) -> dict[int, Deltas]:
    """The updates after each of some numbers of steps."""
    unet = load_unet(folder)
    data = _samples(unet.spec)
    adapter = attach(unet, rank=RANK, alpha=RANK / 2)
    parameters = dict(adapter.named_parameters())
    optimizer = OPTIMIZERS["adamw"](parameters.values(), settings.lr, settings.weight_decay)
    state = TrainState(0, parameters, optimizer, GradScaler("cpu", enabled=False))
    schedule = NoiseSchedule(
        prediction=settings.prediction, zero_terminal_snr=settings.zero_terminal_snr
    )
    loss = Objective(unet, schedule, seed=settings.seed, drops=False)
    found = {}
    for step in range(max(steps)):
        numbers = _numbers(step)
        batch = SampleBatch([data[n % len(data)] for n in numbers], numbers)
        seen = update(state, loss, [batch], settings.max_grad_norm)
        assert settings.max_grad_norm is None or seen.grad_norm > settings.max_grad_norm
        if step + 1 in steps:
            layers = adapter.layers.items()
            found[step + 1] = {to_diffusers(n): layer.delta().detach() for n, layer in layers}
    return found


def train_there(folder: Path, settings: Settings, steps: int) -> Deltas:
    """The same, as diffusers' own training scripts do it."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig

    ours = load_unet(folder)
    data = _samples(ours.spec)
    start = {to_diffusers(n): layer for n, layer in attach(ours, rank=RANK).layers.items()}
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK / 2, target_modules=list(start)))
    layers = {name: unet.get_submodule(name) for name in start}
    for name, layer in layers.items():
        layer.lora_A.default.weight.data.copy_(start[name].lora_a.weight)
    schedule = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=settings.prediction,
        rescale_betas_zero_snr=settings.zero_terminal_snr,
    )
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
    for step in range(steps):
        chosen = [data[n % len(data)] for n in _numbers(step)]
        latents = torch.stack([sample.mean for sample in chosen])
        noise = normal(SHAPE, settings.seed, "noise", samples=_numbers(step))
        t = torch.stack(list(timesteps(settings.seed, step))) + settings.later
        t = t.clamp(0, TIMESTEPS - 1)
        said = unet(schedule.add_noise(latents, noise, t), t, **_told(chosen, settings)).sample
        targets = {"epsilon": noise, "v_prediction": schedule.get_velocity(latents, noise, t)}
        optimizer.zero_grad()
        F.mse_loss(said, targets[settings.prediction]).backward()
        if settings.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def difference(mine: Deltas, theirs: Deltas) -> float:
    """The relative difference of all updates together."""
    assert mine.keys() == theirs.keys()
    between = sum((mine[name] - theirs[name]).double().square().sum() for name in mine)
    size = sum(theirs[name].double().square().sum() for name in mine)
    return float((torch.as_tensor(between) / size).sqrt())


def timesteps(seed: int, step: int) -> Iterator[Tensor]:
    """Those of the samples of a step."""
    for number in _numbers(step):
        yield torch.randint(TIMESTEPS, (), generator=generator(seed, "timestep", sample=number))


def _numbers(step: int) -> range:
    return range(BATCH * step, BATCH * (step + 1))


def _samples(spec: UNetSpec) -> list[Sample]:
    """Random ones; those of SDXL differ in every size id, and no two ids are equal."""
    torch.manual_seed(0)
    return [_sample(spec, number) for number in range(6)]


def _sample(spec: UNetSpec, number: int) -> Sample:
    latent, context = torch.randn(SHAPE), torch.randn(7, spec.context_dim)
    if spec.pooled_dim is None:
        return Sample(str(number), latent, torch.zeros(SHAPE), context)
    sizes = torch.tensor([900.0, 1300, 17, 130, 768, 1152]) + 50 * number
    pooled = torch.randn(spec.pooled_dim)
    return Sample(str(number), latent, torch.zeros(SHAPE), context, pooled, sizes)


def _told(chosen: list[Sample], settings: Settings) -> dict[str, Any]:
    """The conditions of some samples as diffusers' net takes them."""
    context = {"encoder_hidden_states": torch.stack([sample.context for sample in chosen])}
    pooled = [sample.pooled for sample in chosen if sample.pooled is not None]
    sizes = [sample.time_ids for sample in chosen if sample.time_ids is not None]
    if not pooled:
        return context
    added = {
        "text_embeds": settings.pooled * torch.stack(pooled),
        "time_ids": torch.stack(sizes)[:, list(settings.size_ids)],
    }
    return context | {"added_cond_kwargs": added}

"""One training, twice: with eri, and with diffusers' nets and noise, PEFT's layers and PyTorch.

Both loops begin with the same down matrices and see the same samples, noises and timesteps; apart
from these and from the names of the modules they share nothing.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eri.adapters import attach
from eri.diffusion import NoiseSchedule
from eri.formats.unet_names import to_diffusers
from eri.models import load_unet
from eri.models.unet import UNetSpec
from eri.rng import generator, normal
from eri.run.objective import Objective, Sample, SampleBatch
from eri.train import Step, TrainState

SHAPE = (4, 16, 8)  # smaller ones leave the norms of the deepest level a few numbers to divide by
RANK, ALPHA = 4, 2.0
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
    batches = random_batches(unet.spec, max(steps))
    adapter = attach(unet, rank=RANK, alpha=ALPHA)
    state = TrainState(adapter.flatten())
    schedule = NoiseSchedule(
        prediction=settings.prediction, zero_terminal_snr=settings.zero_terminal_snr
    )
    loss = Objective(unet, schedule, seed=settings.seed, drops=False)
    limits = {"weight_decay": settings.weight_decay, "max_grad_norm": settings.max_grad_norm}
    step = Step(state, loss, **limits)
    found = {}
    for batch in batches:
        seen = step([batch], settings.lr).result()
        assert settings.max_grad_norm is None or seen.grad_norm > settings.max_grad_norm
        state.step += 1
        if state.step in steps:
            layers = adapter.layers.items()
            found[state.step] = {to_diffusers(n): layer.delta().detach() for n, layer in layers}
    return found


def train_there(folder: Path, settings: Settings, batches: int | Sequence[SampleBatch]) -> Deltas:
    """The same, as diffusers' own training scripts do it.

    Args:
        folder: of the base model.
        settings: as for `train_here`.
        batches: of each step; a number stands for so many of those that `train_here` takes.
    """
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig

    ours = load_unet(folder)
    if isinstance(batches, int):
        batches = random_batches(ours.spec, batches)
    start = {to_diffusers(n): layer for n, layer in attach(ours, rank=RANK).layers.items()}
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(start)))
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
    for batch in batches:
        latents, noise, t = _drawn(batch, settings)
        told = _told(batch.samples, settings)
        said = unet(schedule.add_noise(latents, noise, t), t, **told).sample
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


def timesteps(seed: int, numbers: Iterable[int]) -> list[Tensor]:
    """Those of the samples with some numbers."""
    draws = [generator(seed, "timestep", sample=number) for number in numbers]
    return [torch.randint(TIMESTEPS, (), generator=draw) for draw in draws]


def random_batches(spec: UNetSpec, steps: int) -> list[SampleBatch]:
    """Six random samples over and over; their size ids all differ."""
    torch.manual_seed(0)
    samples = [_sample(spec, number) for number in range(6)]
    numbers = [range(BATCH * step, BATCH * (step + 1)) for step in range(steps)]
    return [SampleBatch([samples[n % 6] for n in some], some) for some in numbers]


def _sample(spec: UNetSpec, number: int) -> Sample:
    latent, std, context = torch.randn(SHAPE), torch.rand(SHAPE), torch.randn(7, spec.context_dim)
    if spec.pooled_dim is None:
        return Sample(str(number), latent, std, context)
    sizes = torch.tensor([900.0, 1300, 17, 130, 768, 1152]) + 50 * number
    return Sample(str(number), latent, std, context, torch.randn(spec.pooled_dim), sizes)


def _drawn(batch: SampleBatch, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, noises and timesteps of a batch."""
    shape = tuple(batch.samples[0].mean.shape)
    mean, std = (torch.stack([getattr(s, name) for s in batch.samples]) for name in ("mean", "std"))
    latents = mean + std * normal(shape, settings.seed, "latent", samples=batch.numbers)
    noise = normal(shape, settings.seed, "noise", samples=batch.numbers)
    t = torch.stack(timesteps(settings.seed, batch.numbers)) + settings.later
    return latents, noise, t.clamp(0, TIMESTEPS - 1)


def _told(chosen: Sequence[Sample], settings: Settings) -> dict[str, Any]:
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

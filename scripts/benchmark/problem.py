"""What one step is asked to learn: latents, noises, timesteps and texts, the same for every case.

The samples are those of eri's own training, so that eri draws noise and timestep by itself; `drawn`
tells the other cases what these draws are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eri.rng import generator, normal
from eri.run.micro_batch import Sample, SampleBatch
from scripts.benchmark.families import Family

SAMPLES = 8  # different ones; they come again and again
TEXT_TOKENS = 77
TIMESTEPS = 1000
LR, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-8, 0.01, 1.0
"""So small a rate that all cases still hold the same LoRA after their steps, and predict alike."""


@dataclass(frozen=True)
class Problem:
    """A batch of one size to train on, somewhere, in some type.

    Attributes:
        family: what is trained.
        batch: samples of a step.
        device: where.
        dtype: of the frozen weights and of the arithmetic.
        seed: of noises and timesteps.
        side: of a latent; None: the family's own.
    """

    family: Family
    batch: int
    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    side: int | None = None


@dataclass(frozen=True)
class Inputs:
    """A batch as a peer's step takes it, in float32 on the device."""

    latents: Tensor  # [B, 4, H, W]
    noise: Tensor
    timesteps: Tensor  # int64 [B]
    context: Tensor  # [B, 77, K]
    pooled: Tensor | None  # [B, P]
    time_ids: Tensor | None  # [B, 6]


def random_samples(family: Family, side: int | None = None) -> list[Sample]:
    """Latents of size one with random texts, on the CPU; exact in bfloat16."""
    draws = torch.Generator().manual_seed(1)
    side = side or family.side
    size = 8.0 * side  # pixels

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws).bfloat16().float()

    samples = []
    for number in range(SAMPLES):
        mean = some(4, side, side)
        told: dict[str, Tensor] = {}
        if family.pooled_dim is not None:
            told["pooled"] = some(family.pooled_dim)
            told["time_ids"] = torch.tensor([size, size, 0, 0, size, size])
        context = some(TEXT_TOKENS, family.context_dim)
        samples.append(Sample(f"{number}.png", mean, torch.zeros_like(mean), context, **told))
    return samples


def batch_of(samples: Sequence[Sample], step: int, size: int) -> SampleBatch:
    """The batch of a step, counted from 0."""
    numbers = range(size * step, size * (step + 1))
    return SampleBatch([samples[number % len(samples)] for number in numbers], numbers)


def drawn(batch: SampleBatch, problem: Problem) -> Inputs:
    """A batch with the noise, the timesteps and the latents that eri draws for it."""
    shape, seed = tuple(batch.samples[0].mean.shape), problem.seed
    mean = torch.stack([sample.mean.cpu() for sample in batch.samples])
    std = torch.stack([sample.std.cpu() for sample in batch.samples])
    latents = mean + std * normal(shape, seed, "latent", samples=batch.numbers)
    noise = normal(shape, seed, "noise", samples=batch.numbers)
    each = [generator(seed, "timestep", sample=number) for number in batch.numbers]
    timesteps = [torch.randint(TIMESTEPS, (), generator=draws) for draws in each]
    told = [stacked(batch, name) for name in ("context", "pooled", "time_ids")]
    tensors = [latents, noise, torch.stack(timesteps), *told]
    return Inputs(*(None if t is None else t.to(problem.device) for t in tensors))


def stacked(batch: SampleBatch, name: str) -> Tensor | None:
    """A tensor of all samples; None where they have none."""
    tensors = [getattr(sample, name) for sample in batch.samples]
    return None if tensors[0] is None else torch.stack(tensors).float()

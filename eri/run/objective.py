"""What a run minimises: the denoising loss of its images, with every draw keyed by the sample."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eri.diffusion import NoiseSchedule, denoising_loss
from eri.models.unet import UNet
from eri.rng import generator, normal
from eri.run.conditions import Condition, Conditions, stack
from eri.run.micro_batch import Sample, SampleBatch

__all__ = [
    "Objective",
    "Sample",
    "SampleBatch",
    "ValidationLoss",
    "conditions_of",
    "pixel_weights",
    "validate",
]

VALIDATION_TIMESTEPS = 8
VALIDATION_NOISES = 4


def conditions_of(unet: UNet, samples: Sequence[Sample]) -> Conditions:
    """What the U-Net is told of some samples, as one batch on its device."""
    conditions = [Condition(sample.context, sample.pooled) for sample in samples]
    return stack(unet, conditions, [sample.time_ids for sample in samples])


def pixel_weights(samples: Sequence[Sample]) -> Tensor | None:
    """What each pixel of their latents weighs in the loss, `[B, 1, H, W]`; None: all alike.

    A mask's white weighs 1 and its black the sample's `unmasked_weight`.
    """
    if all(sample.mask is None for sample in samples):
        return None
    weights = []
    for sample in samples:
        mask = torch.ones_like(sample.mean[:1]) if sample.mask is None else sample.mask
        weights.append(mask + sample.unmasked_weight * (1 - mask))
    return torch.stack(weights)


class Objective:
    """A batch to the loss of each of its samples, by way of the tensors that it is computed from.

    Noise, timestep and latent draw are functions of the seed and the sample's number in the run,
    so resuming, and accumulating instead of a larger batch, do not change them.

    Args:
        unet: with the adapter attached.
        schedule: of the noise.
        seed: `train.seed`.
        drops: whether the adapter has dropout, whose draws are then keyed as well.
    """

    def __init__(self, unet: UNet, schedule: NoiseSchedule, *, seed: int, drops: bool) -> None:
        self.unet = unet
        self.schedule = schedule
        self.seed = seed
        self.drops = drops

    def draw(self, batch: SampleBatch) -> dict[str, Tensor]:
        """All that the loss of a batch is computed from, by the names of `__call__`."""
        shape = tuple(batch.samples[0].mean.shape)
        mean = torch.stack([sample.mean for sample in batch.samples])
        std = torch.stack([sample.std for sample in batch.samples])
        if self.drops:
            draws = generator(self.seed, "dropout", sample=batch.numbers[0])
            torch.manual_seed(draws.initial_seed())
        inputs = {
            "mean": mean,
            "std": std,
            "latent": normal(shape, self.seed, "latent", samples=batch.numbers),
            "noise": normal(shape, self.seed, "noise", samples=batch.numbers),
            "timesteps": torch.stack([self._timestep(number) for number in batch.numbers]),
            "shares": torch.tensor([sample.weight for sample in batch.samples]),
        }
        conditions = conditions_of(self.unet, batch.samples)._asdict()
        optional = conditions | {"weights": pixel_weights(batch.samples)}
        return inputs | {name: tensor for name, tensor in optional.items() if tensor is not None}

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The loss of each sample, times its weight, float32 `[B]`; from what `draw` gave."""
        loss = self.loss_at(
            inputs["mean"] + inputs["std"] * inputs["latent"],
            inputs["noise"],
            inputs["timesteps"],
            Conditions(inputs["context"], inputs.get("pooled"), inputs.get("time_ids")),
            weights=inputs.get("weights"),
        )
        return loss * inputs["shares"]

    def loss_at(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        *,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of latents `[B, C, H, W]` with these draws, float32 `[B]`.

        Args:
            latents: x_0.
            noise: ε, of their shape.
            timesteps: t `[B]`.
            conditions: what the U-Net is told.
            weights: of each pixel of a latent, `[B, 1, H, W]`; None: all alike.
        """
        unet = self.unet

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return unet(x.to(unet.dtype), t, *conditions)

        latents, noise = latents.to(unet.device), noise.to(unet.device)
        return denoising_loss(
            predict,
            latents,
            noise,
            timesteps.to(unet.device),
            self.schedule,
            weights=None if weights is None else weights.to(unet.device),
        )

    def told(self, batch: SampleBatch) -> Callable[[], list[str]]:
        """What tells of each sample of a batch; it keeps none of their tensors."""
        pairs = list(zip(batch.files, batch.numbers, strict=True))
        return lambda: [f"{file}, timestep {self._timestep(number)}" for file, number in pairs]

    def _timestep(self, number: int) -> Tensor:
        draws = generator(self.seed, "timestep", sample=number)
        return torch.randint(self.schedule.timesteps, (), generator=draws)


@dataclass(frozen=True)
class ValidationLoss:
    """The loss on held-out images at fixed timesteps and noises."""

    mean: float
    thirds: tuple[float, float, float]  # of the timesteps, from little noise to much


@torch.no_grad()
def validate(
    objective: Objective, samples: Sequence[Sample], *, at_once: int = VALIDATION_TIMESTEPS
) -> ValidationLoss:
    """Measure the loss on held-out images: 8 fixed timesteps times 4 fixed noises for each.

    Args:
        objective: whose net is measured.
        samples: to measure on.
        at_once: samples in a forward pass, at most.
    """
    total = objective.schedule.timesteps
    spread = (torch.arange(VALIDATION_TIMESTEPS) + 0.5) / VALIDATION_TIMESTEPS
    timesteps = (spread * total).long()
    unet = objective.unet
    was_training = unet.training
    unet.eval()
    parts = timesteps.split(at_once)
    try:
        found = [[_held_out(objective, sample, part) for part in parts] for sample in samples]
    finally:
        unet.train(was_training)
    losses = torch.stack([torch.cat(of_a_sample) for of_a_sample in found]).mean(0)
    thirds = [losses[timesteps * 3 // total == third].mean().item() for third in range(3)]
    return ValidationLoss(losses.mean().item(), (thirds[0], thirds[1], thirds[2]))


def _held_out(objective: Objective, sample: Sample, timesteps: Tensor) -> Tensor:
    """The loss of one image at each timestep `[T]`, on the CPU, averaged over the noises."""
    shape, count = tuple(sample.mean.shape), len(timesteps)
    conditions = conditions_of(objective.unet, [sample] * count)
    weights = pixel_weights([sample] * count)
    noises = normal(shape, 0, "validation", samples=range(VALIDATION_NOISES))
    losses = [
        objective.loss_at(
            sample.mean.expand(count, *shape),
            noise.expand(count, *shape),
            timesteps,
            conditions,
            weights=weights,
        )
        for noise in noises
    ]
    return torch.stack(losses).mean(0).cpu()

#!/usr/bin/env python
"""Measure what a mask over half of every image leaves for the other half, on the demo model.

    python scripts/measure_mask.py            # from the root of a clone; 3 minutes on one CPU core

A LoRA is trained three times from the same draws: without masks, with the right half of every image
at half weight, and with the right half left out. The loss on held-out images is then measured over
each half alone. Twice: on the bundled pictures, whose halves teach the same, and on pictures whose
right half is the negative of what it was, so that what it teaches is not in the left half.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from eri.adapters import attach
from eri.diffusion import NoiseSchedule, denoising_loss
from eri.models import load_text, load_unet, load_vae
from eri.rng import normal
from eri.run.objective import Objective, Sample, SampleBatch, conditions_of
from eri.train import Step, TrainState

DEMO = Path(__file__).parents[1] / "eri" / "demo"
MODEL = DEMO / "model"
STEPS = (5, 10, 40)  # after which the loss is measured
BATCH, RANK, RATE = 4, 16, 2e-3
TIMESTEPS = torch.arange(60, 1000, 125)
WAYS = {"no mask": None, "right half at 0.5": 0.5, "right half at 0": 0.0}


@dataclass(frozen=True)
class Halves:
    """A number of the left half of the images and one of the right."""

    left: float
    right: float

    def fall(self, later: "Halves") -> "Halves":
        """How much less both are later, as shares."""
        return Halves(1 - later.left / self.left, 1 - later.right / self.right)


def half(mean: Tensor) -> Tensor:
    """1 in the left half of a latent `[C, H, W]` and 0 in the right, `[1, H, W]`."""
    mask = torch.zeros_like(mean[:1])
    mask[..., : mask.shape[-1] // 2] = 1
    return mask


def encoded(folder: Path, *, negative: bool, count: int | None = None) -> list[Sample]:
    """The pictures of a folder with their captions, their right halves as negatives if asked."""
    vae, text = load_vae(MODEL), load_text(MODEL)
    samples = []
    for path in sorted(folder.glob("*.png"))[:count]:
        picture = Image.open(path).convert("RGB")
        if negative:
            box = (picture.width // 2, 0, picture.width, picture.height)
            picture.paste(ImageOps.invert(picture.crop(box)), box)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float()
        pixels = pixels.view(1, picture.height, picture.width, 3).permute(0, 3, 1, 2)
        mean, std = vae.encode(pixels / 127.5 - 1)
        context, _ = text.encode([path.with_suffix(".txt").read_text(encoding="utf-8").strip()])
        samples.append(Sample(path.name, mean[0], std[0], context[0]))
    return samples


def learn(
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    unmasked: float | None,
    steps: Sequence[int],
) -> dict[int, Halves]:
    """Train, and measure by how much the held-out loss of each half falls until some steps.

    Args:
        samples: to train on.
        held_out: to measure on.
        unmasked: weight of the right halves; None: no mask.
        steps: to measure after.
    """
    unet = load_unet(MODEL)
    state = TrainState(attach(unet, rank=RANK, alpha=RANK).flatten())
    objective = Objective(unet, NoiseSchedule(), seed=0, drops=False)
    update = Step(state, objective, weight_decay=0.01, max_grad_norm=1.0)
    if unmasked is not None:
        samples = [replace(s, mask=half(s.mean), unmasked_weight=unmasked) for s in samples]
    before = measure(objective, held_out)
    falls = {}
    for step in range(max(steps)):
        numbers = range(BATCH * step, BATCH * (step + 1))
        chosen = [samples[number % len(samples)] for number in numbers]
        update([SampleBatch(chosen, numbers)], RATE).result()
        state.step += 1
        if state.step in steps:
            falls[state.step] = before.fall(measure(objective, held_out))
    return falls


@torch.no_grad()
def measure(objective: Objective, samples: Sequence[Sample]) -> Halves:
    """The loss of each half, mean over the samples and fixed timesteps."""
    unet, count = objective.unet, len(TIMESTEPS)
    losses: list[list[Tensor]] = []
    for number, sample in enumerate(samples):
        shape = tuple(sample.mean.shape)
        latents = sample.mean.expand(count, *shape)
        noise = normal(shape, 0, "validation", samples=[number] * count)
        noisy = objective.schedule.add_noise(latents, noise, TIMESTEPS)
        said = unet(noisy, TIMESTEPS, *conditions_of(unet, [sample] * count))
        left = half(sample.mean).expand(count, -1, -1, -1)
        pair = [
            denoising_loss(
                lambda x, t, said=said: said,
                latents,
                noise,
                TIMESTEPS,
                objective.schedule,
                weights=weights,
            )
            for weights in (left, 1 - left)
        ]
        losses.append([half.mean() for half in pair])
    left, right = torch.tensor(losses).mean(0).tolist()
    return Halves(left, right)


def pull(sample: Sample, unmasked: float | None) -> Halves:
    """How strongly the loss pulls at each half of the prediction: its gradient's norm."""
    unet = load_unet(MODEL)
    attach(unet, rank=RANK)
    said: list[Tensor] = []
    unet.register_forward_hook(lambda *call: said.append(call[-1]))
    if unmasked is not None:
        sample = replace(sample, mask=half(sample.mean), unmasked_weight=unmasked)
    objective = Objective(unet, NoiseSchedule(), seed=0, drops=False)
    loss = objective(objective.draw(SampleBatch([sample], range(1))))
    (gradient,) = torch.autograd.grad(loss.sum(), said)
    middle = gradient.shape[-1] // 2
    return Halves(gradient[..., :middle].norm().item(), gradient[..., middle:].norm().item())


def main() -> None:
    """Print a table for each kind of picture.

    The first number is how strongly the loss pulls at the right half of the net's answer, relative
    to the left half and to how it is without a mask; the pairs are by how many percent the held-out
    loss of the left and the right half fell.
    """
    for negative in (False, True):
        samples = encoded(DEMO / "data", negative=negative)
        held_out = encoded(DEMO / "validation", negative=negative)
        print("right halves as negatives" if negative else "pictures as they are")
        steps = "".join(f"{f'after {step} steps':>20}" for step in STEPS)
        print(f"{'':18}{'pull':>8}{steps}")
        plain = pull(samples[0], None)
        for name, unmasked in WAYS.items():
            pulled = pull(samples[0], unmasked)
            ratio = (pulled.right / pulled.left) / (plain.right / plain.left)
            falls = learn(samples, held_out, unmasked, STEPS)
            told = "".join(f"{100 * f.left:12.1f}{100 * f.right:8.1f}" for f in falls.values())
            print(f"{name:18} {ratio:7.3f}{told}")


if __name__ == "__main__":
    main()

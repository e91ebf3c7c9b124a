"""What a run will do, worked out before anything slow happens, and told in a few lines."""

from collections import Counter
from dataclasses import dataclass

import torch

from eri.config import Config
from eri.data import Batches
from eri.errors import ConfigError
from eri.run.base import BaseFacts
from eri.run.dataset import Images
from eri.run.device import choose_device, choose_dtype
from eri.run.prediction import Choice
from eri.train import Plan

__all__ = ["RunPlan", "auto_steps", "plan_run"]

VIEWS_OF_AN_IMAGE = 100
FEWEST_STEPS, MOST_STEPS = 500, 3000
DEFAULT_PROMPTS = 4


@dataclass(frozen=True)
class RunPlan:
    """The decisions of a run."""

    loop: Plan
    choice: Choice  # what the base model is taken for, as far as settings and files say
    device: torch.device
    dtype: torch.dtype
    prompts: tuple[str, ...]  # of the previews
    size: int  # of the previews, side in pixels
    batches: Batches
    lines: tuple[str, ...]  # the same for people


def auto_steps(batches_per_epoch: int, accumulate: int) -> int:
    """Steps in which every image is seen 100 times, but at least 500 and at most 3000.

    The range in which the peers' presets lie for a rank-16 LoRA at their usual learning rates.
    """
    steps = -(-VIEWS_OF_AN_IMAGE * batches_per_epoch // accumulate)
    return min(max(steps, FEWEST_STEPS), MOST_STEPS)


def plan_run(config: Config, facts: BaseFacts, choice: Choice, images: Images) -> RunPlan:
    """Work out the steps, the device, the types and the previews of a run.

    Raises:
        ConfigError: settings that this machine or this model cannot follow.
    """
    device = choose_device()
    if config.train.backend == "cuda":
        raise ConfigError(
            "this version has no CUDA kernels of its own yet",
            where="train.backend",
            hint="auto and reference use PyTorch's",
        )
    size = facts.resolution if config.sample.size == "auto" else config.sample.size
    dtype = choose_dtype(config.train.precision, device)
    if size % facts.step:
        raise ConfigError(
            f"{size} is not a multiple of {facts.step}, as this model needs", where="sample.size"
        )
    batches = Batches(
        images.train.shapes, batch_size=config.train.batch_size, seed=config.train.seed
    )
    steps = config.train.steps
    if steps == "auto":
        steps = auto_steps(batches.steps_per_epoch, config.train.accumulate)
    return RunPlan(
        loop=Plan(
            steps=steps,
            accumulate=config.train.accumulate,
            lr=config.train.lr,
            schedule=config.train.schedule,
            warmup=config.train.warmup,
            max_grad_norm=config.train.max_grad_norm,
            sample_every=config.sample.every,
            save_every=config.save.every,
        ),
        choice=choice,
        device=device,
        dtype=dtype,
        prompts=config.sample.prompts or _captions(images),
        size=size,
        batches=batches,
        lines=(
            *_describe(config, facts, images, batches, steps),
            choice.line if choice.settled else f"{choice.line}; measured before step 1",
            f"device   {device.type}, {str(dtype).removeprefix('torch.')}",
        ),
    )


def _captions(images: Images) -> tuple[str, ...]:
    """Captions to draw when no prompt is given: of held-out images if there are some."""
    shown = images.validation.items or images.train.items
    return tuple(dict.fromkeys(item.captions[0] for item in shown))[:DEFAULT_PROMPTS]


def _describe(
    config: Config, facts: BaseFacts, images: Images, batches: Batches, steps: int
) -> list[str]:
    millions = sum(facts.parts.parameters.values()) / 1e6
    seen = config.train.batch_size * config.train.accumulate
    epochs = steps * config.train.accumulate / batches.steps_per_epoch
    why = f" (auto: {VIEWS_OF_AN_IMAGE} views of each image, {FEWEST_STEPS} to {MOST_STEPS})"
    auto = why if config.train.steps == "auto" else ""
    counts = sorted(Counter(images.train.shapes).items())
    shapes = ", ".join(f"{count} at {shape.width}x{shape.height}" for shape, count in counts)
    return [
        f"model    {facts.name}: {facts.spec.family}, {millions:.1f} M parameters, "
        f"{config.adapter.targets} at rank {config.adapter.rank}, alpha {config.adapter.alpha:g}",
        *(f"         {note}" for note in facts.notes),
        f"images   {len(images.train)}: {shapes}; {len(images.validation)} held out",
        f"training {steps} steps{auto} of up to {seen} images, {epochs:.1f} epochs, "
        f"lr {config.train.lr:g} {config.train.schedule}",
        f"output   {config.output}",
    ]

"""What a run will do, worked out before anything slow happens, and told in a few lines."""

from dataclasses import dataclass

import torch

from eri.config import Config
from eri.data import Batches
from eri.errors import ConfigError
from eri.run.base import BaseFacts
from eri.run.cache_space import CacheSpace, cache_space
from eri.run.dataset import Images
from eri.run.device import choose_device, choose_dtype
from eri.run.footprint import card_memory, footprint
from eri.run.plan_text import (
    cache_lines,
    image_lines,
    memory_lines,
    model_lines,
    time_line,
    training_lines,
)
from eri.run.prediction import Choice
from eri.run.rates import device_name, known_rate
from eri.run.samples import Text, micro_batches, plain_text, texts_drawn
from eri.run.steps import run_samples, run_steps
from eri.train import Plan

__all__ = ["RunPlan", "plan_run"]

DEFAULT_PROMPTS = 4


@dataclass(frozen=True)
class RunPlan:
    """The decisions of a run."""

    loop: Plan
    choice: Choice  # what the base model is taken for, as far as settings and files say
    device: torch.device
    dtype: torch.dtype
    prompts: tuple[Text, ...]  # of the previews
    size: int  # of the previews, side in pixels
    batches: Batches
    space: CacheSpace  # that the cache needs; asked for only once something is encoded
    pace: str  # all that the speed depends on, in words; see `eri.run.rates`
    lines: tuple[str, ...]  # the same for people


def plan_run(
    config: Config, facts: BaseFacts, choice: Choice, images: Images, *, dry_run: bool = False
) -> RunPlan:
    """Work out the steps, the device, the types and the previews of a run, and what it takes.

    Args:
        config: the settings.
        facts: of the base model.
        choice: what it is taken for.
        images: checked ones.
        dry_run: work out the memory where there is no GPU, too; it takes a second or more, and
            a host seldom has too little.

    Raises:
        ConfigError: settings that this machine or this model cannot follow.
    """
    device = choose_device()
    dtype = choose_dtype(config.train.precision, device)
    on_gpu = device.type == "cuda"
    size = _preview_size(config, facts)
    train = config.train
    batches = _order(config, images)
    learned = images.train.learned
    steps = run_steps(train, batches, learned)
    numbers = micro_batches(batches, train.accumulate, range(steps))
    samples = run_samples(train, batches, steps)
    space = cache_space(
        facts,
        images,
        samples=samples,
        drawn=texts_drawn(images.train, batches, numbers, train.seed),
        dtype=dtype,
        device=device,
    )
    pace = _pace(config, facts, images.train.resolution, dtype, device)
    return RunPlan(
        loop=_loop(config, steps),
        choice=choice,
        device=device,
        dtype=dtype,
        prompts=_prompts(config, images),
        size=size,
        batches=batches,
        space=space,
        pace=pace,
        lines=(
            *model_lines(config, facts),
            *image_lines(images, batches),
            *training_lines(train, batches, steps, learned),
            choice.line if choice.settled else f"{choice.line}; measured before step 1",
            f"device   {device.type}, {str(dtype).removeprefix('torch.')}",
            *(_memory(config, facts, images, batches, dtype) if dry_run or on_gpu else ()),
            *cache_lines(space),
            time_line(samples, known_rate(pace)),
            f"output   {config.output}",
        ),
    )


def _order(config: Config, images: Images) -> Batches:
    train = config.train
    return Batches(
        images.train.shapes,
        images.train.repeats,
        batch_size=train.batch_size,
        seed=train.seed,
        epochs=train.epochs,
    )


def _loop(config: Config, steps: int) -> Plan:
    train = config.train
    return Plan(
        steps=steps,
        lr=train.lr,
        schedule=train.schedule,
        warmup=train.warmup,
        sample_every=config.sample.every,
        save_every=config.save.every,
    )


def _preview_size(config: Config, facts: BaseFacts) -> int:
    if config.train.backend == "cuda":
        raise ConfigError(
            "this version has no CUDA kernels of its own yet",
            where="train.backend",
            hint="auto and reference use PyTorch's",
        )
    size = facts.resolution if config.sample.size == "auto" else config.sample.size
    if size % facts.step:
        raise ConfigError(
            f"{size} is not a multiple of {facts.step}, as this model needs", where="sample.size"
        )
    return size


def _prompts(config: Config, images: Images) -> tuple[Text, ...]:
    """What is drawn: the given prompts, as the UIs read them, or captions, of held-out images if
    there are some.
    """
    if config.sample.prompts:
        return tuple((prompt, True) for prompt in config.sample.prompts)
    shown = images.validation if len(images.validation) else images.train
    texts = [plain_text(shown, index) for index in shown.learned]
    return tuple(dict.fromkeys(texts))[:DEFAULT_PROMPTS]


def _memory(
    config: Config, facts: BaseFacts, images: Images, batches: Batches, dtype: torch.dtype
) -> list[str]:
    """What the largest batch takes."""
    sizes = [
        (min(len(bucket.repeats), batches.batch_size), shape)
        for shape, bucket in batches.buckets.items()
    ]
    count, shape = max(sizes, key=lambda size: size[0] * size[1].area)
    needed = footprint(
        facts.spec,
        rank=config.adapter.rank,
        targets=config.adapter.targets,
        dropout=config.adapter.dropout,
        dtype=dtype,
        latents=(count, *(side // facts.latent_factor for side in shape)),
        states=facts.words.tokens * images.train.windows,
    )
    return memory_lines(
        needed,
        count,
        shape,
        card=card_memory(choose_device()),
        of_a_step=batches.batch_size * config.train.accumulate,
    )


def _pace(
    config: Config, facts: BaseFacts, resolution: int, dtype: torch.dtype, device: torch.device
) -> str:
    """All that the speed of a run depends on, in words; what its weights are does not matter."""
    parameters = sum(facts.parts.parameters.values())
    adapter, train = config.adapter, config.train
    return (
        f"{facts.spec.family} of {parameters} parameters, {adapter.targets} at rank "
        f"{adapter.rank}, {dtype}, batches of {train.batch_size} x {train.accumulate} at "
        f"{resolution}, {device_name(device)}"
    )

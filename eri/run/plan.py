"""What a run will do, worked out before anything slow happens, and told in a few lines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from eri.config import Config
from eri.data import Batches, Shape
from eri.errors import ConfigError
from eri.models.arrange import Recompute
from eri.run.backend import check_backend
from eri.run.base import BaseFacts
from eri.run.cache_space import CacheSpace, cache_space
from eri.run.dataset import Images
from eri.run.device import choose_device, choose_dtype
from eri.run.fast_path import leaves_fast_path, runs_lean
from eri.run.footprint import Footprint, footprint
from eri.run.memory_plan import (
    Batch,
    MemoryPlan,
    cost_of_a_part,
    free_memory,
    keep_plan,
    plan_memory,
)
from eri.run.plan_text import (
    cache_lines,
    image_lines,
    memory_lines,
    model_lines,
    slower_lines,
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
    memory: MemoryPlan
    space: CacheSpace  # that the cache needs; asked for only once something is encoded
    pace: str  # all that the speed depends on, in words; see `eri.run.rates`
    lines: tuple[str, ...]  # the same for people


def plan_run(
    config: Config,
    facts: BaseFacts,
    choice: Choice,
    images: Images,
    *,
    dry_run: bool = False,
    made_with: Mapping[str, object] | None = None,
    done: int = 0,
) -> RunPlan:
    """Work out the steps, the device, the types and the previews of a run, and what it takes.

    Args:
        config: the settings.
        facts: of the base model.
        choice: what it is taken for.
        images: checked ones.
        dry_run: work out the memory where there is no GPU, too; it takes a second or more, and
            a host seldom has too little.
        made_with: of the checkpoint that the run goes on from, whose memory plan a deterministic
            run keeps to; None: it begins.
        done: steps of that checkpoint.

    Raises:
        ConfigError: settings that this machine or this model cannot follow.
        MemoryLimitError: the GPU has no room for the model, or for the plan that is kept to.
    """
    device = choose_device()
    dtype = choose_dtype(config.train.precision, device)
    kernels = check_backend(config.train.backend, device)
    size = _preview_size(config, facts)
    train = config.train
    batches = _order(config, images)
    steps = run_steps(train, batches, images.train.learned)
    samples = run_samples(train, batches, steps)
    numbers = micro_batches(batches, train.accumulate, range(steps))
    drawn = texts_drawn(images.train, batches, numbers, train.seed)
    space = cache_space(facts, images, samples=samples, drawn=drawn, dtype=dtype, device=device)
    counts = _counts(batches)
    kept = made_with if train.deterministic else None
    memory = _memory(
        config, facts, images, counts, dtype=dtype, device=device, told=dry_run, kept=kept
    )
    resolution = images.train.resolution
    pace = _pace(config, facts, resolution, dtype=dtype, device=device, memory=memory)
    plan = RunPlan(
        loop=_loop(config, steps),
        choice=choice,
        device=device,
        dtype=dtype,
        prompts=_prompts(config, images),
        size=size,
        batches=batches,
        memory=memory,
        space=space,
        pace=pace,
        lines=(),
    )
    told = _lines(plan, config, facts, images, kernels=kernels, done=done, dry_run=dry_run)
    return replace(plan, lines=told)


def _lines(
    plan: RunPlan,
    config: Config,
    facts: BaseFacts,
    images: Images,
    *,
    kernels: str,
    done: int,
    dry_run: bool,
) -> tuple[str, ...]:
    """What people are told of a plan."""
    train, device, dtype, choice = config.train, plan.device, plan.dtype, plan.choice
    done = min(done, plan.loop.steps)
    left = plan.loop.steps - done
    samples = run_samples(train, plan.batches, plan.loop.steps) * left // plan.loop.steps
    counts = _counts(plan.batches)
    slower = leaves_fast_path(config, device, dtype, plan.memory.recompute)
    return (
        *model_lines(config, facts),
        *image_lines(images, plan.batches),
        *training_lines(train, plan.batches, plan.loop.steps, images.train.learned),
        *([f"done     {done} steps of these; {left} are left"] if done else []),
        choice.line if choice.settled else f"{choice.line}; measured before step 1",
        f"device   {device.type}, {str(dtype).removeprefix('torch.')}",
        kernels,
        *(slower_lines(slower) if dry_run or device.type == "cuda" else ()),
        *memory_lines(plan.memory, *max(counts, key=lambda batch: batch[0] * batch[1].area)),
        *cache_lines(plan.space),
        time_line(samples, known_rate(plan.pace)),
        f"output   {config.output}",
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


def _counts(batches: Batches) -> list[tuple[int, Shape]]:
    """The images in the fullest batch of each shape."""
    return [
        (min(len(bucket.repeats), batches.batch_size), shape)
        for shape, bucket in batches.buckets.items()
    ]


def _memory(
    config: Config,
    facts: BaseFacts,
    images: Images,
    counts: Sequence[tuple[int, Shape]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    told: bool,
    kept: Mapping[str, object] | None,
) -> MemoryPlan:
    """How batches of these sizes are run."""
    largest = max((shape for _, shape in counts), key=lambda shape: shape.area)
    lean = runs_lean(config, device)

    height, width = (side // facts.latent_factor for side in largest)

    def measure(recompute: Recompute) -> Footprint:
        return footprint(
            facts.spec,
            rank=config.adapter.rank,
            targets=config.adapter.targets,
            dropout=config.adapter.dropout,
            dtype=dtype,
            latents=(1, height, width),
            states=facts.words.tokens * images.train.windows,
            lean=lean,
            recompute=recompute,
        )

    batch = Batch([(count, shape.area / largest.area) for count, shape in counts])
    plan = plan_memory(
        config.train.memory,
        batch,
        measure,
        free=free_memory(device),
        lean=lean,
        part=cost_of_a_part(device),
        told=told,
    )
    return plan if kept is None else keep_plan(plan, batch, measure, kept)


def _pace(
    config: Config,
    facts: BaseFacts,
    resolution: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    memory: MemoryPlan,
) -> str:
    """All that the speed of a run depends on, in words; what its weights are does not matter."""
    parameters = sum(facts.parts.parameters.values())
    adapter, train = config.adapter, config.train
    return (
        f"{facts.spec.family} of {parameters} parameters, {adapter.targets} at rank "
        f"{adapter.rank}, {dtype}, batches of {train.batch_size} x {train.accumulate} at "
        f"{resolution}, {memory.pace}, {train.backend} backend"
        f"{', deterministic' if train.deterministic else ''}, {device_name(device)}"
    )

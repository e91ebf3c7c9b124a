"""The parts of a run, built once from its config: what trains, on what, and how it is looked at."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from eri.adapters import Adapter, attach
from eri.config import Config
from eri.diffusion import NoiseSchedule
from eri.models.arrange import arrange
from eri.models.unet import UNet
from eri.models.vae import VAE
from eri.run.base import BaseFacts
from eri.run.conditions import Condition
from eri.run.dataset import Images
from eri.run.device import set_arithmetic
from eri.run.encoding import Encoder
from eri.run.micro_batch import Sample
from eri.run.objective import Objective
from eri.run.plan import RunPlan
from eri.run.preview import Painter, Previews
from eri.run.samples import Samples, micro_batches, texts_drawn, texts_of
from eri.train import MOST, Graphs, Step, TrainState, Workspace

__all__ = ["Encoded", "Parts", "build", "encode"]


@dataclass(frozen=True)
class Parts:
    """Everything that the training loop is connected to."""

    unet: UNet
    adapter: Adapter
    state: TrainState
    objective: Objective
    step: Step
    workspace: Callable[[], AbstractContextManager[None]]  # for what runs between steps
    samples: Samples
    validation: Samples
    previews: Previews


@dataclass(frozen=True)
class Encoded:
    """What the encoders are needed for."""

    samples: Samples  # to train on
    validation: Samples
    prompts: Sequence[tuple[Condition, Condition]]  # of the previews, each with the negative one
    vae: VAE  # that decodes the previews


def encode(config: Config, plan: RunPlan, images: Images, encoder: Encoder) -> Encoded:
    """Encode images, captions and prompts; the encoders are off the device afterwards."""
    set_arithmetic(deterministic=config.train.deterministic)
    train, held_out, vae = images.train, images.validation, encoder.facts.load_vae()
    latents, held_out_latents = encoder.latents(train, vae), encoder.latents(held_out, vae)
    numbers = micro_batches(plan.batches, config.train.accumulate, range(plan.loop.steps))
    drawn = texts_drawn(train, plan.batches, numbers, config.train.seed)
    with encoder.reader() as reader:
        samples = encoder.samples(
            train, latents, reader, (*texts_of(train), *drawn), seed=config.train.seed
        )
        validation = encoder.samples(
            held_out,
            held_out_latents,
            reader,
            texts_of(held_out),
            least_windows=samples.windows,
        )
        prompts = [
            reader.guide(prompt, config.sample.negative, weighted=weighted)
            for prompt, weighted in plan.prompts
        ]
    return Encoded(samples, validation, prompts, vae)


def build(
    config: Config,
    plan: RunPlan,
    facts: BaseFacts,
    encoded: Encoded,
    *,
    settle: Callable[[UNet, Sequence[Sample]], NoiseSchedule],
    say: Callable[[str], None],
) -> Parts:
    """Load the U-Net and attach a fresh adapter.

    Args:
        config: the settings.
        plan: the decisions.
        facts: of the base model.
        encoded: images and prompts.
        settle: decides what the U-Net predicts, and over which schedule, while it is still the
            base model alone.
        say: gets a line when steps cannot run as fast as was planned.
    """
    unet = facts.load_unet(dtype=plan.dtype, device=plan.device)
    schedule = settle(unet, encoded.samples)
    adapter = attach(
        unet,
        rank=config.adapter.rank,
        alpha=config.adapter.alpha,
        dropout=config.adapter.dropout,
        targets=config.adapter.targets,
        seed=config.train.seed,
    )
    unet.train()
    memory = plan.memory
    workspace = Workspace(plan.device) if plan.device.type == "cuda" else None
    if workspace is not None or memory.recompute != "nothing":
        arrange(unet, lean=memory.lean, recompute=memory.recompute)
    state = TrainState(adapter.flatten(), scaling=plan.dtype == torch.float16)
    if workspace is not None:
        torch.cuda.empty_cache()  # of all that was done so far; the workspace cannot use it
    painter = _painter(config, plan, unet, encoded.vae, schedule)
    objective = Objective(unet, schedule, seed=config.train.seed, drops=config.adapter.dropout > 0)
    return Parts(
        unet=unet,
        adapter=adapter,
        state=state,
        objective=objective,
        step=Step(
            state,
            objective,
            weight_decay=config.train.weight_decay,
            max_grad_norm=config.train.max_grad_norm,
            graphs=workspace and Graphs(workspace, MOST if memory.uses_graphs else 0, say),
            told=objective.told,
        ),
        workspace=workspace or nullcontext,
        samples=encoded.samples,
        validation=encoded.validation,
        previews=_previews(config, plan, encoded, adapter, painter),
    )


def _previews(
    config: Config, plan: RunPlan, encoded: Encoded, adapter: Adapter, painter: Painter
) -> Previews:
    return Previews(
        painter=painter,
        prompts=[prompt for prompt, _ in plan.prompts],
        negative_prompt=config.sample.negative,
        conditions=encoded.prompts,
        adapter=adapter,
        size=plan.size,
        folder=config.output / "samples",
    )


def _painter(
    config: Config, plan: RunPlan, unet: UNet, vae: VAE, schedule: NoiseSchedule
) -> Painter:
    wanted = config.sample
    weights = sum(parameter.nbytes for parameter in vae.model.parameters())
    return Painter(
        unet=unet,
        vae=vae,
        schedule=schedule,
        sampler=wanted.sampler,
        steps=wanted.steps,
        guidance=wanted.guidance,
        seed=wanted.seed,
        tiled=not plan.memory.decodes_whole(plan.size, weights),
    )

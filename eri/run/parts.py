"""The parts of a run, built once from its config: what trains, on what, and how it is looked at."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.amp import GradScaler

from eri.adapters import Adapter, attach
from eri.config import Config
from eri.diffusion import NoiseSchedule
from eri.models.unet import UNet
from eri.run.base import Base, BaseFacts, load_base
from eri.run.conditions import guide
from eri.run.dataset import Encoder, Images, Samples
from eri.run.objective import Objective, Sample
from eri.run.plan import RunPlan
from eri.run.preview import Painter, Previews
from eri.train import OPTIMIZERS, TrainState

__all__ = ["Parts", "build"]


@dataclass(frozen=True)
class Parts:
    """Everything that the training loop is connected to."""

    base: Base
    adapter: Adapter
    state: TrainState
    objective: Objective
    samples: Samples
    validation: Samples
    previews: Previews


def build(
    config: Config,
    plan: RunPlan,
    facts: BaseFacts,
    images: Images,
    encoder: Encoder,
    *,
    settle: Callable[[UNet, Sequence[Sample]], NoiseSchedule],
) -> Parts:
    """Load the base model, encode the images and prompts, and attach a fresh adapter.

    Args:
        config: the settings.
        plan: the decisions.
        facts: of the base model.
        images: to train on.
        encoder: of images and prompts.
        settle: decides what the U-Net predicts, and over which schedule, while it is still the
            base model alone.
    """
    _set_arithmetic(config)
    base = load_base(facts, dtype=plan.dtype, device=plan.device)
    samples = encoder.samples(base, images.train)
    validation = encoder.samples(base, images.validation, samples.windows)
    schedule = settle(base.unet, samples)
    adapter = attach(
        base.unet,
        rank=config.adapter.rank,
        alpha=config.adapter.alpha,
        dropout=config.adapter.dropout,
        targets=config.adapter.targets,
        seed=config.train.seed,
    )
    base.unet.train()
    optimizer = OPTIMIZERS[config.train.optimizer]
    parameters = dict(adapter.named_parameters())
    return Parts(
        base=base,
        adapter=adapter,
        state=TrainState(
            step=0,
            parameters=parameters,
            optimizer=optimizer(parameters.values(), config.train.lr, config.train.weight_decay),
            scaler=GradScaler(plan.device.type, enabled=plan.dtype == torch.float16),
        ),
        objective=Objective(
            base.unet,
            schedule,
            seed=config.train.seed,
            drops=config.adapter.dropout > 0,
        ),
        samples=samples,
        validation=validation,
        previews=_previews(config, plan, base, adapter, schedule),
    )


def _previews(
    config: Config, plan: RunPlan, base: Base, adapter: Adapter, schedule: NoiseSchedule
) -> Previews:
    wanted = config.sample
    return Previews(
        painter=Painter(
            unet=base.unet,
            vae=base.vae,
            schedule=schedule,
            sampler=wanted.sampler,
            steps=wanted.steps,
            guidance=wanted.guidance,
            seed=wanted.seed,
        ),
        prompts=plan.prompts,
        negative_prompt=wanted.negative,
        conditions=[guide(base.text, prompt, wanted.negative) for prompt in plan.prompts],
        adapter=adapter,
        size=plan.size,
        folder=config.output / "samples",
    )


def _set_arithmetic(config: Config) -> None:
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, in the VAE's convolutions too
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it said
    torch.use_deterministic_algorithms(config.train.deterministic)

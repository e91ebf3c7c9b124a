"""The parts of a run, built once from its config: what trains, on what, and how it is looked at."""

import os
from dataclasses import dataclass

import torch
from torch.amp import GradScaler

from eri.adapters import Adapter, attach
from eri.config import Config
from eri.run.base import Base, BaseFacts, load_base
from eri.run.conditions import guide
from eri.run.dataset import Encoder, Images, Samples
from eri.run.objective import Objective
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
) -> Parts:
    """Load the base model, encode the images and prompts, and attach a fresh adapter."""
    _set_arithmetic(config)
    base = load_base(facts, dtype=plan.dtype, device=plan.device)
    samples = encoder.samples(base, images.train)
    validation = encoder.samples(base, images.validation, samples.windows)
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
            base.schedule,
            seed=config.train.seed,
            drops=config.adapter.dropout > 0,
        ),
        samples=samples,
        validation=validation,
        previews=Previews(
            painter=Painter(
                unet=base.unet,
                vae=base.vae,
                schedule=base.schedule,
                sampler=config.sample.sampler,
                steps=config.sample.steps,
                guidance=config.sample.guidance,
                seed=config.sample.seed,
            ),
            prompts=plan.prompts,
            negative_prompt=config.sample.negative,
            conditions=[
                guide(base.text, prompt, config.sample.negative) for prompt in plan.prompts
            ],
            adapter=adapter,
            size=plan.size,
            folder=config.output / "samples",
        ),
    )


def _set_arithmetic(config: Config) -> None:
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, in the VAE's convolutions too
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it said
    torch.use_deterministic_algorithms(config.train.deterministic)

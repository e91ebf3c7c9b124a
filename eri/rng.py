"""Random draws as functions of what they are for, so that nothing has to remember a state.

Every draw of a run is keyed by (seed, purpose, step, sample): the same key gives the same numbers
whatever was drawn before it, on any device, after any resume and in any batch. The numbers come
from PyTorch's CPU generator and are moved to where they are used.
"""

import hashlib
from collections.abc import Iterable
from typing import Literal

import torch

__all__ = ["Purpose", "generator", "normal"]

Purpose = Literal[
    "init",
    "order",
    "view",
    "caption",
    "timestep",
    "latent",
    "noise",
    "dropout",
    "preview",
    "validation",
    "probe",
]


def generator(seed: int, purpose: Purpose, *, step: int = 0, sample: int = 0) -> torch.Generator:
    """A fresh CPU generator for one draw of a run.

    Args:
        seed: the run's `train.seed`.
        purpose: what the numbers are for; different purposes never share numbers.
        step: the training step, counted from 0 (an epoch, for `"order"`); 0 where the sample's
            number alone names the draw.
        sample: the number of the sample among all samples of the run.
    """
    key = f"{seed}/{purpose}/{step}/{sample}".encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal(
    shape: tuple[int, ...],
    seed: int,
    purpose: Purpose,
    *,
    step: int = 0,
    samples: Iterable[int],
) -> torch.Tensor:
    """Standard normal numbers, one independent draw for each sample index.

    Returns:
        float32 `[B, *shape]` on the CPU, one row for each of `samples`.
    """
    draws = [
        torch.randn(shape, generator=generator(seed, purpose, step=step, sample=sample))
        for sample in samples
    ]
    return torch.stack(draws)

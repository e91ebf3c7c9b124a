"""Ways to leave something out when a run goes on; each must show in the digest at its end.

Hooks for sessions of the fork server, given the step that the session goes on from. `other_threads`
leaves nothing out: it is what a checkpoint is compared with.
"""

import hashlib
import os
from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import Tensor

from eri import rng
from eri.data import batches
from eri.train import TrainState, loop

__all__ = ["forget_data", "forget_moments", "forget_noise", "forget_rate", "other_threads"]


def forget_noise(start: int) -> None:
    """Timesteps and noise come from a generator that was seeded when the session began."""
    salt = os.urandom(8)

    def blake2b(key: bytes, digest_size: int) -> "hashlib._Hash":
        salted = key + salt if b"/noise/" in key or b"/timestep/" in key else key
        return hashlib.blake2b(salted, digest_size=digest_size)

    rng.hashlib = SimpleNamespace(blake2b=blake2b)


def forget_data(start: int) -> None:
    """The images begin anew."""
    right = batches.Batches.batch
    batches.Batches.batch = lambda self, number: right(self, max(number - start, 0))


def forget_rate(start: int) -> None:
    """The schedule begins anew."""
    right = loop.learning_rate
    loop.learning_rate = lambda *args, step, **kwargs: right(*args, step=step - start, **kwargs)


def forget_moments(start: int) -> None:
    """The optimizer begins anew."""
    right = TrainState.load

    def load(self: TrainState, tensors: Mapping[str, Tensor], numbers: Mapping) -> None:
        right(self, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, numbers)

    TrainState.load = load


def other_threads(start: int) -> None:
    """PyTorch tells of one thread more; with more of them it adds in another order."""
    threads = torch.get_num_threads() + 1
    torch.get_num_threads = lambda: threads

"""Matrices of an adapter that was never trained."""

import torch

from eri.formats.lora_pair import LoRAPair


def random_pair(shape: tuple[int, ...], *, rank: int, alpha: float) -> LoRAPair:
    """For a layer whose weight has that shape."""
    return LoRAPair(
        down=torch.randn(rank, *shape[1:]),
        up=torch.randn(shape[0], rank, *(1 for _ in shape[2:])),
        alpha=alpha,
    )

"""The U-Nets that are measured, at their published sizes, with random weights that every case has.

A weight is a function of its name in diffusers and of its shape, so that each implementation fills
its own modules without another one's being built. The draws keep the size of activations: a net of
zeros, infinities or vanishing numbers runs faster than a real one.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.families import SD15_UNET, SDXL_UNET
from tests.full_size import UNETS

RANK = 16
UP_SIZE = 0.02  # of the up matrices: from zero ones the down matrices would get no gradient


@dataclass(frozen=True)
class Family:
    """A U-Net to train a LoRA of rank 16 on all linear layers of its transformers.

    Attributes:
        name: `sd15` or `sdxl`.
        config: arguments of diffusers' `UNet2DConditionModel`.
        side: of a latent.
        modules: that a LoRA is on.
        teraflops: of one sample's step; None where nobody has counted.
        floor_ms: that an H200 needs for one sample.
        folder: of a model with weights of its own; None: they are random.
    """

    name: str
    config: Mapping[str, Any]
    side: int
    modules: int
    teraflops: float | None = None
    floor_ms: float | None = None
    folder: Path | None = None

    @property
    def tiny(self) -> bool:
        """Whether it is the small one that runs anywhere, and says nothing about speed."""
        return self.teraflops is None

    @property
    def context_dim(self) -> int:
        """Width of a text state."""
        return self.config["cross_attention_dim"]

    @property
    def pooled_dim(self) -> int | None:
        """Width of a pooled text; None where the model takes none."""
        if "addition_embed_type" not in self.config:
            return None
        ids = 6 * self.config["addition_time_embed_dim"]
        return self.config["projection_class_embeddings_input_dim"] - ids


# FLOP counted by torch's FlopCounterMode on the meta device, 2 for a multiplication with its
# addition: SDXL 6.85 forward with the LoRA, 7.89 backward to activations and LoRA only; SD1.5 0.81
# and 1.00. Recomputation is not work and does not count. The floors are that arithmetic at 790
# TFLOP/s, which an H200 reaches in bfloat16 products, and the bytes of norms, gates and LoRA
# gradients, each read and written once, at 4.3 TB/s; one after the other.
FAMILIES = {
    "sd15": Family("sd15", UNETS["sd15"], 64, 192, 1.81, 2.8),
    "sdxl": Family("sdxl", UNETS["sdxl"], 128, 722, 14.74, 22.7),
}
TINY = {
    "sd15": Family("sd15", SD15_UNET, 16, 192),
    "sdxl": Family("sdxl", SDXL_UNET, 16, 192),
}


def family_of(name: str, *, tiny: bool) -> Family:
    """The family of a name, at full size or tiny."""
    return (TINY if tiny else FAMILIES)[name]


def random_weight(name: str, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """A weight of a U-Net by its name in diffusers, float32 and exact in bfloat16."""
    value = torch.randn(shape, generator=_draws(name, device), device=device)
    if len(shape) > 1:
        value.mul_(value[0].numel() ** -0.5)
    else:
        value.mul_(0.05).add_(name.endswith("weight"))  # a norm's weight is around 1
    return value.bfloat16().float()


def random_down(module: str, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """The down matrix of a module's LoRA, by the module's name in diffusers, as a fresh one is."""
    bound = torch.Size(shape[1:]).numel() ** -0.5
    value = torch.empty(shape, device=device)
    return value.uniform_(-bound, bound, generator=_draws(f"{module}.down", device))


def random_up(module: str, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """The up matrix, as after some training."""
    draws = _draws(f"{module}.up", device)
    return UP_SIZE * torch.randn(shape, generator=draws, device=device)


def materialize(
    module: nn.Module,
    device: torch.device | str,
    dtype: torch.dtype,
    name_in_diffusers: Callable[[str], str] = str,
) -> nn.Module:
    """Give a net on the meta device its random weights; it comes back frozen."""
    module = module.to(dtype).to_empty(device=device).requires_grad_(False)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            weight = random_weight(name_in_diffusers(name), tuple(parameter.shape), device)
            parameter.copy_(weight)
    return module


def _draws(name: str, device: torch.device | str) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(zlib.crc32(name.encode()))

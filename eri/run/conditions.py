"""What the U-Net is told beside the latent and the timestep: the prompt, and for SDXL the sizes.

SDXL's further conditions, the pooled text and six size ids: Podell et al., arXiv 2307.01952,
sections 2.2 and A. Models without them are told the text states alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from eri.models.unet import UNet

__all__ = ["Condition", "Conditions", "stack"]


@dataclass(frozen=True)
class Condition:
    """A prompt as the U-Net is told it."""

    context: Tensor  # text states, [S, K]
    pooled: Tensor | None = None  # of the whole text, [P]; None where the model has none


class Conditions(NamedTuple):
    """The conditions of a batch, in the order in which the U-Net takes them."""

    context: Tensor  # [B, S, K], in the U-Net's type
    pooled: Tensor | None = None  # [B, P], in the U-Net's type
    time_ids: Tensor | None = None  # [B, 6], float32


def stack(
    unet: UNet, prompts: Sequence[Condition], time_ids: Sequence[Tensor | None]
) -> Conditions:
    """The conditions of a batch, on the U-Net's device.

    Args:
        unet: whose spec decides what it is told; without a `pooled_dim`, the text states alone.
        prompts: the condition of each sample's prompt.
        time_ids: the size ids `[6]` of each sample.

    Raises:
        ValueError: the U-Net needs a pooled text and size ids, and a sample lacks one.
    """
    context = torch.stack([prompt.context for prompt in prompts])
    context = context.to(unet.device, unet.dtype)
    if unet.spec.pooled_dim is None:
        return Conditions(context)
    pooled = _stack([prompt.pooled for prompt in prompts], "the pooled text")
    sizes = _stack(time_ids, "the size ids")
    # float32 whatever the net computes in: bf16 would round a side of 1022 pixels to 1024
    return Conditions(
        context,
        pooled.to(unet.device, unet.dtype),
        sizes.to(unet.device, torch.float32),
    )


def _stack(parts: Sequence[Tensor | None], what: str) -> Tensor:
    present = [part for part in parts if part is not None]
    if len(present) < len(parts):
        raise ValueError(f"this U-Net needs {what} of every sample, and one has none")
    return torch.stack(present)

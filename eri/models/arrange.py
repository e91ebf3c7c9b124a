"""How a U-Net is laid out and run for training; what it computes stays the same.

Maps lie pixel by pixel (`channels_last`), as tensor cores read them and as tokens lie. The
projections of an attention that read the same input lie side by side, so that one product serves
them all. And the blocks either run as plain modules, of which autograd keeps what it likes, or
*lean*: by the functions of `eri.layers.projection`, `group_norm_silu` and `frozen_conv`, which keep
the inputs of norms, the queries, keys, values and results of attentions, and what goes into gates,
and compute the rest again on the way. In units of tokens times width that is 17 for a transformer
block. `Recompute` goes on from there.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
"""

import torch
from torch import Tensor, nn

from eri.layers import LoRAConv2d, LoRALinear
from eri.layers.lora import base_of
from eri.models.blocks import (
    RECOMPUTE,
    BasicTransformerBlock,
    Recompute,
    ResNetBlock,
    SpatialTransformer,
)
from eri.models.stage import LoRAUNetBlock
from eri.models.unet import UNet

__all__ = ["RECOMPUTE", "Recompute", "arrange"]


@torch.no_grad()
def arrange(unet: UNet, *, lean: bool, recompute: Recompute = "nothing") -> None:
    """Lay out a U-Net for training, in place, and choose what it keeps for the backward pass.

    Args:
        unet: frozen, with its adapter.
        lean: keep little, see above; else plain modules.
        recompute: what of the transformer blocks is computed again.

    Raises:
        ValueError: lean, and something beside an adapter trains, or an adapter has dropout.
    """
    if lean:
        _check_lean(unet)
    for module in unet.modules():
        if isinstance(module, UNet | LoRAUNetBlock | ResNetBlock | SpatialTransformer):
            module.lean = lean
        elif isinstance(module, BasicTransformerBlock):
            module.lean = lean
            module.recompute = recompute
            _lay_side_by_side(module.attn1.to_q, module.attn1.to_k, module.attn1.to_v)
            _lay_side_by_side(module.attn2.to_k, module.attn2.to_v)
        elif isinstance(module, nn.Conv2d) and not module.weight.requires_grad:
            module.weight.data = _pixel_by_pixel(module.weight.data)


def _pixel_by_pixel(weight: Tensor) -> Tensor:
    """A filter `[N, K, h, w]` as `channels_last`, said by its strides even where it is 1×1.

    Either order fits the memory of a 1×1 filter, and the strides alone tell which one is meant.
    """
    _, channels, height, width = weight.shape
    strides = (height * width * channels, 1, width * channels, channels)
    return weight.contiguous(memory_format=torch.channels_last).as_strided(weight.shape, strides)


def _check_lean(unet: UNet) -> None:
    adapters = [m for m in unet.modules() if isinstance(m, LoRALinear | LoRAConv2d)]
    if any(layer.dropout.p > 0 for layer in adapters):
        raise ValueError("arrange: lean blocks have no dropout on adapters")
    allowed = {id(p) for m in adapters for part in (m.lora_a, m.lora_b) for p in part.parameters()}
    for name, parameter in unet.named_parameters():
        if parameter.requires_grad and id(parameter) not in allowed:
            raise ValueError(f"arrange: lean blocks need frozen weights, and {name} trains")


def _lay_side_by_side(*layers: nn.Module) -> None:
    weights = [base_of(layer).weight for layer in layers]
    whole = torch.stack([weight.data for weight in weights])
    for weight, part in zip(weights, whole, strict=True):
        weight.data = part

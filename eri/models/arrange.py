"""How a U-Net is laid out and run for training; what it computes stays the same.

Maps lie pixel by pixel (`channels_last`), as tensor cores read them and as tokens lie. And the net
either runs as plain modules, of which autograd keeps what it likes, or *lean*: the transformer
blocks of a map as one function (`eri.models.lean`), and each resnet as one
(`eri.models.lean_resnet`). These keep the inputs of norms, the queries, keys, values and results of
attentions, and what goes into gates, and compute the rest again on the way. In units of tokens
times width that is 17 for a transformer block. `Recompute` goes on from there. The weights of lean
blocks' linear layers lie where products read them, see `eri.layers.projection`; the modules have
views of them. Copies of A and B lie beside them: whoever changes the matrices in a way that PyTorch
does not count (`_version`), as its fused optimizers do, calls `Adapter.changed` afterwards.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
"""

import torch
from torch import Tensor, nn

from eri.layers import LoRAConv2d, LoRALinear
from eri.layers.lora import base_of
from eri.models.blocks import BasicTransformerBlock, ResNetBlock, SpatialTransformer
from eri.models.lean import RECOMPUTE, Recompute
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
        ValueError: lean, and something beside an adapter trains, a matrix of one does not, or one
            has dropout.
    """
    if lean:
        _check_lean(unet)
    pixels: set[nn.Module] = set()  # convolutions that run as linear layers on pixels
    for module in unet.modules():
        if isinstance(module, UNet | LoRAUNetBlock | ResNetBlock):
            module.lean = lean
        elif isinstance(module, SpatialTransformer):
            module.make_lean(lean)
            module.recompute = recompute
            pixels |= {base_of(end) for end in (module.proj_in, module.proj_out) if lean}
        elif isinstance(module, BasicTransformerBlock):
            module.recompute = recompute
        elif isinstance(module, nn.Conv2d) and module not in pixels:
            if not module.weight.requires_grad:
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
    trained = [p for m in adapters for part in (m.lora_a, m.lora_b) for p in part.parameters()]
    if not all(parameter.requires_grad for parameter in trained):
        raise ValueError("arrange: lean blocks train all matrices of an adapter, and one is frozen")
    allowed = set(map(id, trained))
    for name, parameter in unet.named_parameters():
        if parameter.requires_grad and id(parameter) not in allowed:
            raise ValueError(f"arrange: lean blocks need frozen weights, and {name} trains")

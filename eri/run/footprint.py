"""How much memory training takes, worked out from the net itself before any weight is loaded.

The net is built without memory (PyTorch's `meta` device) and run once on a batch that has only a
shape, with its adapter on. What autograd keeps for the backward pass is counted tensor by tensor.
Attention is counted as its fused kernels keep it, whatever this machine would run: queries, keys,
values, output and one number a row, never the scores (Dao et al., arXiv 2205.14135, section 3.1).

Not counted: what single kernels need for a moment, and what the allocator keeps in pieces. On an
H100 (PyTorch 2.11, SD1.5 at 512² and SDXL at 768² and 1024², batches of 1 to 8, bf16 and fp32,
rank 16) the result was 0.2 to 2.6 % below the most that was allocated, and 1.6 to 6.4 % below the
most that was reserved. Previews come after a step has freed its activations; the VAE, in float32,
takes 1.1 GiB for one of 512² and 3.4 GiB for one of 1024² then, which is less than those of a batch
of one image of SDXL and 0.2 GiB more than those of SD1.5.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from eri.adapters import attach
from eri.models.unet import UNet, UNetSpec

__all__ = ["Footprint", "card_memory", "footprint"]

BYTES_OF_A_TRAINED_NUMBER = 16  # itself, its gradient and AdamW's two moments, each in float32


@dataclass(frozen=True)
class Footprint:
    """Bytes that a step of training holds on its device."""

    weights: int  # of the frozen net
    adapter: int  # matrices, gradients and optimizer
    activations: int  # what the forward pass keeps for the backward pass

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapter + self.activations


@lru_cache
def footprint(
    spec: UNetSpec,
    *,
    rank: int,
    targets: str,
    dropout: float,
    dtype: torch.dtype,
    latents: tuple[int, int, int],
    states: int,
) -> Footprint:
    """Work out the memory of a training step.

    Args:
        spec: of the U-Net.
        rank: of the adapter.
        targets: of the adapter.
        dropout: of the adapter.
        dtype: of the frozen weights and the net's arithmetic.
        latents: images in a batch, and height and width of their latents.
        states: text states of a caption.
    """
    with torch.device("meta"):
        unet = UNet(spec).to(dtype)
        images, height, width = latents
        x = torch.empty(images, spec.in_channels, height, width, dtype=dtype)
        inputs = [
            x,
            torch.empty(images),
            torch.empty(images, states, spec.context_dim, dtype=dtype),
        ]
        if spec.pooled_dim is not None:
            inputs += [torch.empty(images, spec.pooled_dim, dtype=dtype), torch.empty(images, 6)]
    frozen = sum(parameter.nbytes for parameter in unet.parameters())
    adapter = attach(unet, rank=rank, dropout=dropout, targets=targets)
    unet.train()
    kept = _Kept(unet)
    with _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda x: x):
        unet(*inputs).float().square().mean()  # the loss is computed in float32
    return Footprint(
        weights=frozen,
        adapter=BYTES_OF_A_TRAINED_NUMBER * sum(p.numel() for p in adapter.parameters()),
        activations=kept.bytes,
    )


def card_memory(device: torch.device) -> int | None:
    """The bytes that a GPU has; None of a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory


class _Kept:
    """Counts the memory of tensors that autograd keeps; those that share memory count once."""

    def __init__(self, unet: UNet) -> None:
        self._counted = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
        self.bytes = 0

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._counted:
            self._counted.add(storage._cdata)  # it stays the memory's own as long as that is kept
            self.bytes += storage.nbytes()
        return tensor.detach()


class _FusedAttention(TorchFunctionMode):
    """Attention as the fused kernels compute it; `meta` tensors would take the one with scores."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return func(*args, **(kwargs or {}))

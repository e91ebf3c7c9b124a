"""How much memory training takes, worked out from the net itself before any weight is loaded.

The net is built without memory (PyTorch's `meta` device) and trained for one step on an image that
has only a shape, with its adapter on and arranged as it will be. Every tensor of the forward and
the backward pass is followed, see `eri.run.live_bytes`: what autograd keeps, what is computed again
and what lives for a moment. All of that grows with the number of images and with their area.

Not counted: what single kernels need while they run, and what the allocator keeps in pieces; see
`eri.run.memory_plan`.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

import eri.adapters
import eri.layers
import eri.models
import eri.run
from eri.adapters import attach
from eri.layers.flat import Flat
from eri.layers.lora import LoRALayer
from eri.models.arrange import Recompute, arrange
from eri.models.unet import UNet, UNetSpec
from eri.run.live_bytes import LiveBytes, backward, fused_attention
from eri.run.remembered import recall, remember

__all__ = ["Footprint", "footprint"]

FOOTPRINTS = "footprints"  # what they are remembered as


@dataclass(frozen=True)
class Footprint:
    """Bytes that a step of training holds on its device."""

    weights: int  # of the frozen net
    adapter: int  # matrices, gradients and optimizer, and copies of matrices where they are read
    activations: int  # the most that forward and backward pass hold at once

    @property
    def resident(self) -> int:
        """What is there all the time."""
        return self.weights + self.adapter

    @property
    def total(self) -> int:
        """All of it."""
        return self.resident + self.activations


def footprint(
    spec: UNetSpec,
    *,
    rank: int,
    targets: str,
    dropout: float,
    dtype: torch.dtype,
    latents: tuple[int, int, int],
    states: int,
    lean: bool = False,
    recompute: Recompute = "nothing",
) -> Footprint:
    """Work out the memory of a training step, or recall it: for SDXL it takes seconds.

    Args:
        spec: of the U-Net.
        rank: of the adapter.
        targets: of the adapter.
        dropout: of the adapter.
        dtype: of the frozen weights and the net's arithmetic.
        latents: images in a batch, and height and width of their latents.
        states: text states of a caption.
        lean: how the net is arranged; see `eri.models.arrange`.
        recompute: likewise.
    """
    arrangement = (rank, targets, dropout, dtype, latents, states, lean, recompute)
    key = f"{spec} {arrangement} {_code()}"
    known = recall(FOOTPRINTS, key)
    if isinstance(known, list) and len(known) == 3 and all(type(n) is int and n > 0 for n in known):
        return Footprint(*known)
    unet, flat = _on_meta(spec, rank, targets, dropout, dtype)
    arrange(unet, lean=lean, recompute=recompute)
    inputs = _inputs(spec, latents, states, dtype)
    of_the_adapter = [flat.master, flat.grad, flat.exp_avg, flat.exp_avg_sq]
    frozen = [p for p in unet.parameters() if not p.requires_grad]
    copies = _copies(unet)  # some lie beside weights
    weights = sum(p.nbytes for p in frozen)
    held = LiveBytes([*unet.parameters(), *of_the_adapter, *copies, *inputs])
    with held, fused_attention():
        backward(unet(*inputs).float().square().mean())  # the loss is computed in float32
    found = Footprint(
        weights=weights,
        adapter=_memory(of_the_adapter) + _memory([*frozen, *copies]) - weights,
        activations=held.peak,
    )
    remember(FOOTPRINTS, key, [found.weights, found.adapter, found.activations])
    return found


def _copies(unet: UNet) -> list[Tensor]:
    """The copies of matrices where they are read."""
    layers = [module for module in unet.modules() if isinstance(module, LoRALayer)]
    copiers = dict.fromkeys(layer.copied_by for layer in layers)
    return [copy.target for copier in copiers if copier for copy in copier.copies()]


def _memory(tensors: Iterable[Tensor]) -> int:
    """The bytes of the memory that some tensors lie in."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@lru_cache
def _code() -> str:
    """What a footprint hangs on beside its arguments: the code of the net, and PyTorch's."""
    digest = hashlib.blake2b(torch.__version__.encode(), digest_size=8)
    for module in (eri.adapters, eri.layers, eri.models, eri.run):
        for file in sorted(Path(str(module.__file__)).parent.glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


@lru_cache(maxsize=1)  # it is run once for every arrangement that is thought of
def _on_meta(
    spec: UNetSpec, rank: int, targets: str, dropout: float, dtype: torch.dtype
) -> tuple[UNet, Flat]:
    with torch.device("meta"):
        unet = UNet(spec).to(dtype)
    flat = attach(unet, rank=rank, dropout=dropout, targets=targets).flatten()
    return unet.train(), flat


def _inputs(
    spec: UNetSpec, latents: tuple[int, int, int], states: int, dtype: torch.dtype
) -> list[Tensor]:
    images, height, width = latents
    with torch.device("meta"):
        inputs = [
            torch.empty(images, spec.in_channels, height, width, dtype=dtype),
            torch.empty(images),
            torch.empty(images, states, spec.context_dim, dtype=dtype),
        ]
        if spec.pooled_dim is not None:
            inputs += [torch.empty(images, spec.pooled_dim, dtype=dtype), torch.empty(images, 6)]
    return inputs

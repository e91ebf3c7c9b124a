"""How a batch is run so that it fits: how many images at once, and what is computed again.

A batch that does not fit at once is run in parts whose gradients are summed; that changes neither
what a sample is nor what it counts. What the backward pass needs of a transformer block is kept or
computed again, see `eri.models.arrange`. Both cost time, so of all ways that fit the one is taken
that is expected to be the fastest.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

import torch

from eri.errors import MemoryLimitError
from eri.models.arrange import RECOMPUTE, Recompute
from eri.models.vae import TILE
from eri.run.footprint import Footprint

__all__ = [
    "LEAST",
    "Batch",
    "MemoryPlan",
    "free_memory",
    "keep_plan",
    "plan_memory",
    "reserved",
    "shown_size",
]

AT_ONCE = 8
"""Images in a forward pass where memory is not short; small ones cost little more together."""

COST_OF_A_PART = 0.8
"""What it takes to begin a part of a batch, in images: small parts do not fill a GPU. Measured on
an H200 with SDXL at 1024x1024: 175 ms for 4 images at once, 197 ms as 2 and 2, 262 ms singly."""

MULTIPROCESSORS = 132
"""Of that GPU; one with fewer is filled by less."""

COST_OF_RECOMPUTING: dict[Recompute, float] = {
    "nothing": 0.0,
    "feed-forward": 0.10,
    "projections": 0.17,
    "blocks": 0.31,
}
"""What is computed again, as a share of the time of a step that does not; measured likewise."""

COST_WITHOUT_GRAPHS = 1.3
"""How much longer a step takes that no CUDA graph can hold, as a share; measured likewise. It hangs
on the processor that launches the kernels."""

RESERVED = 1.05
"""What PyTorch's allocator holds, over what tensors take: pieces between them that fit nothing."""

WORKSPACES = 256 * 2**20
"""Bytes that libraries take for themselves: cuBLAS' and cuDNN's workspaces, kernels, graphs."""

DECODED_PIXEL = 3073
ENCODED_PIXEL = 4810
"""Bytes that the VAE of the Stable Diffusions takes for a pixel that it decodes, as worked out from
its layers in float32, and encodes in TF32, as measured on an H200; its weights come on top."""

Mode = Literal["auto", "fast", "small"]
"""Values of `train.memory`."""

Way = tuple[int, Recompute]
"""Images at once, and what is computed again."""

LEAST: Way = (1, RECOMPUTE[-1])
"""The way that takes the least memory."""


@dataclass(frozen=True)
class Batch:
    """The images that a step runs at most, as sizes of batches of one shape.

    Attributes:
        sizes: of each shape, the images of its fullest batch, and its area relative to that of the
            shape that was measured.
    """

    sizes: Sequence[tuple[int, float]]

    @property
    def images(self) -> int:
        """Of the fullest batch."""
        return max(count for count, _ in self.sizes)

    def at_once(self, micro: int) -> float:
        """What is run at once at the most, in images of the shape that was measured."""
        return max(min(count, micro) * area for count, area in self.sizes)


@dataclass(frozen=True)
class MemoryPlan:
    """How batches are run, and what that is expected to take.

    Attributes:
        mode: the setting.
        micro: images that are run at once, at most.
        lean: whether blocks keep little; see `eri.models.arrange`.
        recompute: what is computed again.
        needed: bytes at the largest part of a batch; None: not worked out.
        free: bytes that the device has for this process; None: not asked, as it is no GPU.
        halved: of the images at once, those that are really run so, where an earlier session ran
            out of memory with more; None: all.
    """

    mode: Mode
    micro: int
    lean: bool
    recompute: Recompute
    needed: Footprint | None = None
    free: int | None = None
    halved: int | None = None

    @property
    def record(self) -> dict[str, object]:
        """What of it rounding hangs on, as a checkpoint keeps it, and the setting behind it."""
        return {
            "memory.mode": self.mode,
            "memory.at_once": self.micro,
            "memory.halved": self.halved,
            "memory.lean": self.lean,
            "memory.recompute": self.recompute,
        }

    @property
    def peak(self) -> int | None:
        """Bytes that PyTorch is expected to reserve at the most; None: not worked out."""
        return None if self.needed is None else reserved(self.needed.total)

    @property
    def fits(self) -> bool:
        """Whether that is free, as far as it is known."""
        return self.peak is None or self.free is None or self.peak <= self.free

    @property
    def uses_graphs(self) -> bool:
        """Whether steps on a GPU are recorded."""
        return uses_graphs(self.lean, self.recompute)

    @property
    def without_gradients(self) -> int:
        """Images in a forward pass that keeps nothing, at most; on a GPU as many as in a step."""
        return self.micro if self.free is not None else max(self.micro, AT_ONCE)

    @property
    def pace(self) -> str:
        """What the speed hangs on, in words."""
        blocks = "lean" if self.lean else "plain"
        return f"{self.micro} at once, {blocks} blocks, {self.recompute} recomputed"

    @property
    def limit(self) -> int | None:
        """Bytes that the encoders may take before the U-Net loads; None: no limit is known."""
        return self.peak if self.mode == "small" and self.free is not None else self.free

    def encodes_whole(self, pixels: int, vae: int) -> bool:
        """Whether the VAE encodes an image at once; in tiles it gives slightly other numbers.

        Args:
            pixels: of the image.
            vae: bytes of its weights.
        """
        return self.limit is None or vae + ENCODED_PIXEL * pixels + WORKSPACES <= self.limit

    def decodes_whole(self, side: int, vae: int) -> bool:
        """Whether the VAE decodes a preview at once, beside the net: where the step takes as much.

        Args:
            side: of the preview, in pixels.
            vae: bytes of its weights.
        """
        if side <= TILE or self.needed is None or self.free is None or self.peak is None:
            return True
        return reserved(self.needed.resident + vae + DECODED_PIXEL * side**2) <= self.peak


def plan_memory(
    mode: Mode,
    batch: Batch,
    measure: Callable[[Recompute], Footprint],
    *,
    free: int | None,
    lean: bool,
    part: float = COST_OF_A_PART,
    told: bool = True,
) -> MemoryPlan:
    """Choose how batches are run.

    Args:
        mode: `auto`, the fastest way that fits; `fast`, at once and nothing computed again, whether
            it fits or not; `small`, the way that takes the least.
        batch: what is run.
        measure: works out the memory of one image, by what is computed again.
        free: bytes; None: not known, and taken for enough.
        lean: see `MemoryPlan`.
        part: what it takes to begin a part of a batch, in images.
        told: whether the memory is worked out where nothing hangs on it, too.

    Raises:
        MemoryLimitError: the net and the adapter alone are more than is free.
    """
    ways = _ways(batch.images, lean=lean, part=part)
    if mode == "small":
        ways = [LEAST]
    elif mode == "fast" or free is None:
        ways = ways[:1]
    else:
        ways.append(LEAST)  # where nothing fits

    def planned(micro: int, recompute: Recompute) -> MemoryPlan:
        needed = None
        if told or free is not None:
            needed = _times(measure(recompute), batch.at_once(micro))
        return MemoryPlan(mode, micro, lean, recompute, needed, free)

    plan = planned(*ways[0])
    _require_resident(plan)
    for way in ways[1:]:
        if plan.fits:
            break
        plan = planned(*way)
    return plan


def keep_plan(
    plan: MemoryPlan,
    batch: Batch,
    measure: Callable[[Recompute], Footprint],
    record: Mapping[str, object],
) -> MemoryPlan:
    """The plan of an earlier session instead of what fits best now, as its bits hang on that.

    Args:
        plan: what would be done now.
        batch: what is run.
        measure: see `plan_memory`.
        record: of the earlier plan; where it is none, or of another setting, there is nothing kept.

    Raises:
        MemoryLimitError: it does not fit into what is free now.
    """
    match record:
        case {
            "memory.mode": plan.mode,
            "memory.at_once": int(micro),
            "memory.halved": int() | None as halved,
            "memory.recompute": str(recompute),
        } if micro > 0 and (halved is None or halved > 0) and recompute in RECOMPUTE:
            pass
        case _:
            return plan
    needed = None if plan.needed is None else _times(measure(recompute), batch.at_once(micro))
    kept = replace(plan, micro=micro, recompute=recompute, needed=needed, halved=halved)
    if kept.peak is not None and not kept.fits:
        raise MemoryLimitError(
            f"train.deterministic keeps to the checkpoint's memory plan, {kept.pace}: it takes "
            f"{shown_size(kept.peak)}, and {shown_size(kept.free or 0)} are free",
            hint="end what else runs on the GPU, or go on with other rounding: --set "
            "train.deterministic=false --allow-change train.deterministic",
        )
    return kept


def free_memory(device: torch.device) -> int | None:
    """The bytes that PyTorch can have of a GPU now; None of a CPU.

    What other processes hold is not free, and a process may be kept below what is
    (`torch.cuda.set_per_process_memory_fraction`, or `PYTORCH_ALLOC_CONF`).
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    share = 1.0
    if hasattr(torch.cuda, "get_per_process_memory_fraction"):
        share = torch.cuda.get_per_process_memory_fraction(device.index or 0)
    return min(free + torch.cuda.memory_reserved(device), int(share * total))


def uses_graphs(lean: bool, recompute: Recompute) -> bool:
    """Whether steps can be recorded: what plain blocks compute again may draw numbers again."""
    return lean or recompute == "nothing"


def cost_of_a_part(device: torch.device) -> float:
    """What it takes to begin a part of a batch on a device, in images."""
    if device.type != "cuda":
        return COST_OF_A_PART
    found = torch.cuda.get_device_properties(device).multi_processor_count
    return COST_OF_A_PART * min(found / MULTIPROCESSORS, 1.0)


def reserved(tensors: int) -> int:
    """Bytes that PyTorch and the libraries below it take for so many bytes of tensors."""
    return ceil(RESERVED * tensors) + WORKSPACES


def _ways(images: int, *, lean: bool, part: float = COST_OF_A_PART) -> list[Way]:
    """All that are worth a thought, from the fastest on.

    Of the sizes that make equally many parts only the smallest is.
    """
    sizes = sorted({ceil(images / parts) for parts in range(1, images + 1)}, reverse=True)

    def time(way: Way) -> float:
        micro, recompute = way
        more = COST_OF_RECOMPUTING[recompute]
        more += 0 if uses_graphs(lean, recompute) else COST_WITHOUT_GRAPHS
        return (images + part * ceil(images / micro)) * (1 + more)

    return sorted(((size, recompute) for size in sizes for recompute in RECOMPUTE), key=time)


def _times(one: Footprint, images: float) -> Footprint:
    """What so many images take; activations grow with their number and their area."""
    return Footprint(one.weights, one.adapter, ceil(one.activations * images))


def _require_resident(plan: MemoryPlan) -> None:
    if plan.needed is None or plan.free is None or plan.needed.resident <= plan.free:
        return
    raise MemoryLimitError(
        f"the U-Net and its adapter alone take {shown_size(plan.needed.resident)}, and "
        f"{shown_size(plan.free)} of the GPU are free",
        hint="end what else runs on the GPU (nvidia-smi lists it), or set a smaller adapter.rank",
    )


def shown_size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"

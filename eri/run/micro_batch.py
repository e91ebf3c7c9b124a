"""Encoded images as the net is trained on them, and how they travel between processes and devices.

Worker processes import this file: it stays free of models and everything else that is slow to load.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from eri.data import PLAIN, Shape, View, size_ids

__all__ = ["Packed", "Sample", "SampleBatch", "size_tensor"]

TENSORS = ("mean", "std", "context", "pooled", "time_ids", "mask")  # of a sample
ALIGNMENT = 16  # bytes; a tensor may begin wherever its type allows, and on a GPU read fast


@dataclass(frozen=True)
class Sample:
    """An image as the net is trained on it."""

    file: str
    mean: Tensor  # of its latent, [C, H, W]
    std: Tensor  # [C, H, W]
    context: Tensor  # text states of its caption, [S, K]
    pooled: Tensor | None = None  # of its caption, [P]; SDXL
    time_ids: Tensor | None = None  # how it was scaled and cut, float32 [6]; SDXL
    mask: Tensor | None = None  # what of it is learned, float32 [1, H, W] in 0…1; None: all
    unmasked_weight: float = 0.0  # of what the mask leaves out, relative to what it keeps
    weight: float = 1.0  # factor of its loss


def size_tensor(width: int, height: int, shape: Shape, view: View = PLAIN) -> Tensor:
    """The size ids of an image that is cut to `shape`, float32 `[6]`; see `eri.data.size_ids`."""
    return torch.tensor(size_ids(width, height, shape, view), dtype=torch.float32)


@dataclass(frozen=True)
class SampleBatch:
    """Samples of one shape, and each one's number among all samples of the run."""

    samples: Sequence[Sample]
    numbers: Sequence[int]

    @property
    def files(self) -> list[str]:
        """The file of each sample."""
        return [sample.file for sample in self.samples]

    def parts(self, size: int) -> list[Self]:
        """The same in batches of at most so many samples."""
        return [
            replace(
                self, samples=self.samples[at : at + size], numbers=self.numbers[at : at + size]
            )
            for at in range(0, len(self), size)
        ]

    def __len__(self) -> int:
        return len(self.samples)


class _Place(NamedTuple):
    """Where in a block of bytes a tensor lies, and what it is there."""

    start: int
    end: int
    dtype: torch.dtype
    shape: torch.Size

    def read(self, block: Tensor) -> Tensor:
        return block[self.start : self.end].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Packed:
    """A batch whose tensors lie in one block of bytes.

    However large the batch is, it takes one file descriptor to another process, one piece of pinned
    memory and one copy to a GPU; and the message that names it fits into a pipe at once, so that a
    process that dies leaves no half of one there.
    """

    block: Tensor  # uint8 [bytes]
    places: Sequence[dict[str, _Place]]  # of each sample's tensors, by their names
    batch: SampleBatch  # whose tensors are empty

    @classmethod
    def of(cls, batch: SampleBatch) -> Self:
        """Copy the tensors of a batch into a block on the CPU."""
        places: list[dict[str, _Place]] = []
        end = 0
        for sample in batch.samples:
            places.append({})
            for name, tensor in _tensors(sample).items():
                start = -(-end // ALIGNMENT) * ALIGNMENT
                end = start + tensor.nbytes
                places[-1][name] = _Place(start, end, tensor.dtype, tensor.shape)
        block = torch.empty(end, dtype=torch.uint8)
        for sample, where in zip(batch.samples, places, strict=True):
            for name, tensor in _tensors(sample).items():
                where[name].read(block).copy_(tensor)
        nothing = torch.empty(0)
        empty = [replace(s, **dict.fromkeys(_tensors(s), nothing)) for s in batch.samples]
        return cls(block, places, SampleBatch(empty, batch.numbers))

    def pin_memory(self) -> Self:
        """The same in pinned memory; PyTorch's `DataLoader` calls this."""
        return self._with(Tensor.pin_memory)

    def to(self, device: torch.device) -> Self:
        """The same on a device; from pinned memory the copy runs beside this process."""
        return self._with(lambda block: block.to(device, non_blocking=True))

    def unpack(self) -> SampleBatch:
        """The batch, its tensors views of the block."""
        samples = [
            replace(sample, **{name: place.read(self.block) for name, place in where.items()})
            for sample, where in zip(self.batch.samples, self.places, strict=True)
        ]
        return SampleBatch(samples, self.batch.numbers)

    def _with(self, move: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, block=move(self.block))


def _tensors(sample: Sample) -> dict[str, Tensor]:
    """Those that it has, by their names."""
    return {name: tensor for name in TENSORS if (tensor := getattr(sample, name)) is not None}

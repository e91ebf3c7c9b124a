"""One update of the adapter: micro-batches, backward, clip, check, optimizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from eri.errors import NonFiniteError
from eri.train.state import TrainState

__all__ = ["Loss", "MicroBatch", "StepNumbers", "update"]


class MicroBatch(Protocol):
    """Some samples of one shape; the loop asks only how many, and of which files."""

    @property
    def files(self) -> Sequence[str]:
        """The file of each sample."""
        ...

    def __len__(self) -> int:
        """How many samples."""
        ...


Loss = Callable[[Any], Tensor]
"""A micro-batch to the loss of each of its samples, float32 `[B]`."""

SMALLEST_SCALE = 1.0  # fp16 halves its loss scale at an overflow; below this it is none of fp16's


@dataclass(frozen=True)
class StepNumbers:
    """What one update was like."""

    loss: float  # mean over the samples
    grad_norm: float  # before clipping
    samples: int


def update(
    state: TrainState, loss: Loss, batches: Sequence[MicroBatch], max_grad_norm: float | None
) -> StepNumbers:
    """Update the parameters once from some micro-batches, each sample with the same weight.

    Args:
        state: its parameters and optimizer are changed; its step is not.
        loss: the loss of each sample of a micro-batch.
        batches: the micro-batches.
        max_grad_norm: clip the gradient's global norm to this; None: do not.

    Raises:
        NonFiniteError: the loss or the gradient is not finite; nothing was updated.
    """
    parameters = list(state.parameters.values())
    samples = sum(len(batch) for batch in batches)
    state.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for batch in batches:
        share = loss(batch).sum() / samples
        state.scaler.scale(share).backward()
        total = total.to(share.device) + share.detach()
    state.scaler.unscale_(state.optimizer)
    clip = float("inf") if max_grad_norm is None else max_grad_norm
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    numbers = StepNumbers(total.item(), grad_norm.item(), samples)
    _check(state, total, grad_norm, [file for batch in batches for file in batch.files])
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return numbers


def _check(state: TrainState, loss: Tensor, grad_norm: Tensor, files: Sequence[str]) -> None:
    """Refuse the update if a number in it is not finite; an fp16 overflow is the scaler's."""
    if loss.isfinite() and grad_norm.isfinite():
        return
    overflow = state.scaler.is_enabled() and state.scaler.get_scale() >= SMALLEST_SCALE
    if loss.isfinite() and overflow:
        return
    raise NonFiniteError(
        f"the loss is {loss.item():g} and the gradient's norm {grad_norm.item():g}",
        where=f"step {state.step + 1}",
        hint="try a smaller train.lr, and look at these images; what was saved before is untouched",
        problems=files,
    )

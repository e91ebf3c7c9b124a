"""One update of the adapter: micro-batches, backward, clip, check, optimizer.

Nothing in it waits for the device. What changes from step to step is written to the device before,
and its loss and gradient norm come back beside it; whoever wants them asks `Pending` later. So the
host prepares the next step while the device works on this one, and a step can be captured as a
CUDA graph.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from eri.errors import NonFiniteError
from eri.layers.adamw import Control, adamw_, adamw_workspace
from eri.train.graphs import Graphs
from eri.train.state import TrainState

__all__ = ["Loss", "MicroBatch", "Pending", "Step", "StepNumbers"]

GROWTH_INTERVAL = 2000  # steps without an overflow after which fp16's loss scale is doubled

Inputs = Mapping[str, Tensor]
Told = Callable[[], Sequence[str]]
"""Tells of each sample of a micro-batch; called only where a step has failed."""


class MicroBatch(Protocol):
    """Some samples of one shape; the loop asks only how many, and of which files."""

    @property
    def files(self) -> Sequence[str]:
        """The file of each sample."""
        ...

    def __len__(self) -> int:
        """How many samples."""
        ...


class Loss(Protocol):
    """What is minimised."""

    def draw(self, batch: Any) -> Inputs:
        """All that the loss of a micro-batch is computed from, chance included."""
        ...

    def __call__(self, inputs: Inputs) -> Tensor:
        """The loss of each sample, float32 `[B]`: on the device, without waiting for it."""
        ...


@dataclass(frozen=True)
class StepNumbers:
    """What one update was like."""

    loss: float  # mean over the samples
    grad_norm: float  # before clipping
    samples: int


@dataclass(frozen=True)
class Pending:
    """A step that the device may be working on still."""

    step: int  # counted from 1
    files: Sequence[str]
    lr: float
    told: Told  # of each sample
    _numbers: Tensor  # of the control block, on the host once the event has come
    _event: torch.cuda.Event | None

    def is_done(self) -> bool:
        """Whether nobody would have to wait for the result."""
        return self._event is None or self._event.query()

    def result(self) -> StepNumbers:
        """Wait for the step, and tell what it was like.

        Raises:
            NonFiniteError: its loss or its gradient is not finite; neither it nor any later step
                has changed anything.
        """
        if self._event is not None:
            self._event.synchronize()
        loss, norm = self._numbers[Control.LOSS].item(), self._numbers[Control.GRAD_NORM].item()
        if self._numbers[Control.BAD] != 0:
            raise NonFiniteError(
                f"the loss is {loss:g} and the gradient's norm {norm:g}, at a rate of {self.lr:g}",
                where=f"step {self.step}",
                hint="try a smaller train.lr, and look at these images",
                problems=self.told(),
            )
        return StepNumbers(loss, norm, len(self.files))


class Step:
    """Updates a state, each sample of a step with the same weight.

    Args:
        state: its parameters and what the optimizer keeps are changed; its step is not.
        loss: of each sample of a micro-batch.
        weight_decay: of AdamW, times the learning rate.
        max_grad_norm: clip the gradient's global norm to this; None: do not.
        graphs: bring inputs to a GPU and run there what is done with them; None on the CPU.
        told: of a micro-batch, what tells of its samples without holding them; None: their files.
    """

    def __init__(
        self,
        state: TrainState,
        loss: Loss,
        *,
        weight_decay: float,
        max_grad_norm: float | None,
        graphs: Graphs | None = None,
        told: Callable[[Any], Told] | None = None,
    ) -> None:
        self.state = state
        self.loss = loss
        self.told = told or _told_files
        self.weight_decay = weight_decay
        self.max_grad_norm = float("inf") if max_grad_norm is None else max_grad_norm
        self.graphs = graphs
        self._workspace = adamw_workspace(state.control.device)

    def __call__(self, batches: Sequence[MicroBatch], lr: float) -> Pending:
        """Begin one update from some micro-batches.

        An error leaves the state as it was, but for gradients that `make_room` forgets; unless it
        comes within the update itself: then the state is not `whole`.
        """
        state = self.state
        samples = sum(len(batch) for batch in batches)
        files = [file for batch in batches for file in batch.files]
        tellers = [self.told(batch) for batch in batches]
        numbers = torch.empty(state.control.shape, pin_memory=state.control.is_cuda)
        self._tell(lr, 1 / samples, state.step + 1)
        for place, batch in enumerate(batches, start=1):
            inputs = self.loss.draw(batch)
            run = self._run if place < len(batches) else self._run_and_update
            if self.graphs is None:
                run(inputs)
            else:
                self.graphs(run, inputs)
        event = self._ask(numbers)  # after an update nothing may fail
        return Pending(
            state.step + 1,
            files,
            lr,
            lambda: [line for teller in tellers for line in teller()],
            numbers,
            event,
        )

    def make_room(self) -> None:
        """Give back all memory that is held for later steps; they begin anew."""
        self.state.flat.grad.zero_()
        gc.collect()  # what an error held
        if self.graphs is not None:
            self.graphs.clear()
            torch.cuda.empty_cache()

    def _run(self, inputs: Inputs) -> None:
        """Forward and backward; on the device alone."""
        control = self.state.control
        losses = self.loss(inputs)
        share = control[Control.SHARE]
        losses.backward((share * control[Control.SCALE]).expand_as(losses))
        control[Control.LOSS].add_(losses.detach().sum() * share)

    def _run_and_update(self, inputs: Inputs) -> None:
        """The same, and the update from all gradients since the last one."""
        self._run(inputs)
        flat = self.state.flat
        self.state.whole = False
        adamw_(
            flat.master,
            flat.exp_avg,
            flat.exp_avg_sq,
            flat.grad,
            control=self.state.control,
            workspace=self._workspace,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            growth_interval=GROWTH_INTERVAL if self.state.scaling else 0,
        )
        flat.changed()
        self.state.whole = True

    def _tell(self, lr: float, share: float, step: int) -> None:
        """Write what is new in a step to the device."""
        values = torch.zeros(4)
        for place, value in (Control.LR, lr), (Control.SHARE, share), (Control.STEP, step):
            values[place] = value
        if self.state.control.is_cuda:
            values = values.pin_memory()  # a pageable copy would wait for the device
        self.state.control[:4].copy_(values, non_blocking=True)

    def _ask(self, numbers: Tensor) -> torch.cuda.Event | None:
        """Have the control block copied as it will be after this step; tells when it will be so."""
        control = self.state.control
        numbers.copy_(control, non_blocking=True)
        if not control.is_cuda:
            return None
        event = torch.cuda.Event()
        event.record()
        return event


def _told_files(batch: MicroBatch) -> Told:
    files = list(batch.files)
    return lambda: files

"""Faults inside a step, a preview or a save: hooks for sessions of the fork server."""

import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eri.files import commit
from eri.layers import adamw
from eri.run import preview
from eri.run.objective import Objective
from eri.train import MicroBatch, Pending, Step

__all__ = ["NOT_FINITE", "not_finite", "out_of_memory"]

HELD = 2**26  # bytes that a step asks for where the limit on memory is real


def out_of_memory(where: str, step: int, times: int) -> None:
    """Let a step, a preview, a save or an update run out of memory, so many times from a step on.

    Args:
        where: `step`, `limit` (a step, under a limit that the system keeps), `previews`, `save` or
            `update`.
        step: the first that fails.
        times: that it fails; so many previews fail while they are sampled, all others while they
            are decoded.
    """
    left = [times]

    def fails(now: int) -> bool:
        left[0] -= now >= step
        return now >= step and left[0] >= 0

    match where:
        case "step" | "limit":
            _in_step(fails, _limited if where == "limit" else _raised)
        case "previews":
            right = preview.sample
            preview.sample = lambda *given, **more: (_raised if fails(step) else right)(
                *given, **more
            )
            preview.VAE.decode = _raised
        case "save":
            _in_save(fails)
        case "update":
            _in_update(fails)


def _raised(*given: object, **more: object) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _limited() -> None:
    """What PyTorch's allocator says where the system gives nothing more."""
    status = Path("/proc/self/status").read_text()
    size = next(line for line in status.splitlines() if line.startswith("VmSize"))
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(size.split()[1]) * 1024, before[1]))
    try:
        torch.ones(HELD, dtype=torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _in_step(fails: Callable[[int], bool], fail: Callable[[], None]) -> None:
    """In the last micro-batch, when gradients of it are there already."""
    run = Step._run_and_update

    def running(self: Step, inputs: Mapping[str, Tensor]) -> None:
        if fails(self.state.step + 1):
            self._run(inputs)
            fail()
        run(self, inputs)

    Step._run_and_update = running


def _in_save(fails: Callable[[int], bool]) -> None:
    """When all files of the checkpoint are there but its manifest."""
    write = commit._write_manifest

    def writing(folder: Path, *rest: Any) -> None:
        if fails((folder.parent / "log.jsonl").read_text().count("\n")):
            raise MemoryError
        write(folder, *rest)

    commit._write_manifest = writing


def _in_update(fails: Callable[[int], bool]) -> None:
    """When it has changed the weights, and nothing else."""
    update = adamw._in_order

    def half(master: Tensor, *rest: Any) -> None:
        control = rest[3]
        if fails(int(control[adamw.Control.STEP])):
            master.add_(1)
            raise MemoryError
        update(master, *rest)

    adamw._in_order = half


def not_finite(where: str, step: int) -> None:
    """Let something become NaN or infinite in a step.

    Args:
        where: one of `NOT_FINITE`.
        step: counted from 1.
    """
    call = Step.__call__

    def called(self: Step, batches: Sequence[MicroBatch], lr: float) -> Pending:
        if self.state.step + 1 == step:
            NOT_FINITE[where](self)
        return call(self, batches, lr)

    Step.__call__ = called


def _objective(step: Step) -> Objective:
    assert isinstance(step.loss, Objective)
    return step.loss


def _input(name: str, value: float) -> Callable[[Step], None]:
    def spoil(step: Step) -> None:
        objective = _objective(step)
        right = objective.draw

        def draw(batch: Any) -> dict[str, Tensor]:
            inputs = right(batch)
            inputs[name].view(-1)[0] = value
            return inputs

        objective.draw = draw

    return spoil


def _loss(step: Step) -> None:
    objective = _objective(step)
    right = objective.loss_at
    objective.loss_at = lambda *given, **more: right(*given, **more) + float("inf")


def _gradient(step: Step) -> None:
    parameter = next(iter(step.state.flat.parameters.values()))
    parameter.register_hook(lambda gradient: gradient * float("nan"))


def _weight(step: Step) -> None:
    frozen = next(p for p in _objective(step).unet.parameters() if not p.requires_grad)
    frozen.data.view(-1)[0] = float("nan")


def _kept(name: str) -> Callable[[Step], None]:
    def spoil(step: Step) -> None:
        getattr(step.state.flat, name)[0] = float("nan")

    return spoil


NOT_FINITE: dict[str, Callable[[Step], None]] = {
    "latent": _input("mean", float("nan")),
    "text": _input("context", float("inf")),
    "loss": _loss,
    "gradient": _gradient,
    "base weight": _weight,
    "adapter weight": _kept("master"),
    "optimizer state": _kept("exp_avg"),
}

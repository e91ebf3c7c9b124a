"""Everything that a run has to remember between two steps, in one object."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from eri.errors import ModelError
from eri.layers.adamw import CONTROL_SIZE, Control
from eri.layers.flat import Flat

__all__ = ["TrainState"]

SEPARATOR = "/"  # no parameter name has one: <parameter>/<what the optimizer keeps of it>
KEPT = ("exp_avg", "exp_avg_sq")  # of each parameter: AdamW's moments
NUMBERS = {"updates": Control.UPDATES, "scale": Control.SCALE, "growth": Control.GROWTH}
OTHER_VERSION = "another version wrote it; --restart begins anew beside it"
FIRST_SCALE = 2.0**16  # of fp16's loss


class TrainState:
    """The step reached, what trains, and what the optimizer and the loss scaler remember.

    Nothing else of a run is stateful: data order and noise are functions of the step.

    Args:
        flat: the parameters, with their gradients and moments.
        scaling: whether the loss is scaled, as fp16 needs.
    """

    def __init__(self, flat: Flat, *, scaling: bool = False) -> None:
        self.step = 0  # done, those included whose update an overflow took
        self.whole = True  # False where an update ended early; that is not to be saved
        self.flat = flat
        self.scaling = scaling
        # the numbers that steps read and write on the device; see `eri.layers.adamw`
        self.control = torch.zeros(CONTROL_SIZE, device=flat.master.device)
        self.control[Control.SCALE] = FIRST_SCALE if scaling else 1.0

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """What the optimizer keeps of each parameter, by `<parameter>/<name>`."""
        return {
            f"{name}{SEPARATOR}{key}": view
            for key in KEPT
            for name, view in self.flat.views(getattr(self.flat, key)).items()
        }

    def numbers(self) -> dict[str, object]:
        """The rest, as JSON can hold it."""
        control: list[float] = self.control.tolist()
        found: dict[str, object] = {name: control[place] for name, place in NUMBERS.items()}
        return {"step": self.step, "scaling": self.scaling} | found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, object]) -> None:
        """Take what `optimizer_tensors` and `numbers` gave.

        Raises:
            ModelError: they belong to other parameters, or a number is missing.
        """
        mine = self.optimizer_tensors()
        strange = sorted(tensors.keys() - mine.keys())
        if strange:
            name, _, kind = strange[0].rpartition(SEPARATOR)
            if name in self.flat.parameters:
                what = f"the optimizer state has {kind!r}, which this version does not know"
                raise ModelError(what, hint=OTHER_VERSION)
            raise ModelError(f"the optimizer state speaks of {name!r}, which does not train")
        missing = sorted(mine.keys() - tensors.keys())
        if missing:
            raise ModelError(f"the optimizer state lacks {missing[0]!r}")
        step = numbers.get("step")
        if not isinstance(step, int):
            raise ModelError("the state lacks its step")
        # a loss that was not scaled says nothing of how one is to be scaled, nor the other way
        taken = NUMBERS if numbers.get("scaling") is self.scaling else {"updates": Control.UPDATES}
        for name, place in taken.items():
            number = numbers.get(name)
            if not isinstance(number, int | float):
                raise ModelError(f"the state lacks its {name}", hint=OTHER_VERSION)
            if not math.isfinite(number):
                raise ModelError(f"the state's {name} is {number}")
            self.control[place] = number
        for name, tensor in tensors.items():
            if tensor.shape != mine[name].shape or not tensor.isfinite().all():
                what = "the optimizer state of {!r} has another shape, or a number not finite"
                raise ModelError(what.format(name))
            mine[name].copy_(tensor)
        self.step = step

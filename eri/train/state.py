"""Everything that a run has to remember between two steps, in one object."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from eri.errors import ModelError

__all__ = ["TrainState"]

SEPARATOR = "/"  # no parameter name has one: <parameter>/<what the optimizer keeps of it>


@dataclass
class TrainState:
    """The step reached, what trains, and what the optimizer and the loss scaler remember.

    Nothing else of a run is stateful: data order and noise are functions of the step.
    """

    step: int  # updates done
    parameters: dict[str, nn.Parameter]
    optimizer: Optimizer
    scaler: GradScaler  # of fp16's loss; disabled for other types

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """What the optimizer keeps of each parameter, by `<parameter>/<name>`."""
        return {
            f"{name}{SEPARATOR}{key}": torch.as_tensor(value)
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state[parameter].items()
        }

    def numbers(self) -> dict[str, object]:
        """The rest, as JSON can hold it."""
        return {"step": self.step, "scaler": self.scaler.state_dict()}

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, object]) -> None:
        """Take what `optimizer_tensors` and `numbers` gave.

        Raises:
            ModelError: they belong to other parameters, or a number is missing.
        """
        states: dict[str, dict[str, Tensor]] = {name: {} for name in self.parameters}
        for key, tensor in tensors.items():
            name, _, what = key.rpartition(SEPARATOR)
            if name not in states:
                raise ModelError(f"the optimizer state speaks of {name!r}, which does not train")
            states[name][what] = tensor
        step, scaler = numbers.get("step"), numbers.get("scaler")
        if not isinstance(step, int) or not isinstance(scaler, dict):
            raise ModelError("the state lacks its step or its loss scaler")
        if step and not all(states.values()):
            missing = next(name for name, state in states.items() if not state)
            raise ModelError(f"the optimizer state lacks {missing!r}")
        packed = self.optimizer.state_dict()
        packed["state"] = dict(enumerate(states[name] for name in self.parameters)) if step else {}
        self.optimizer.load_state_dict(packed)
        if scaler:
            self.scaler.load_state_dict(scaler)
        self.step = step

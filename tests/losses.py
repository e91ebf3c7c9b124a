"""What `Step` minimises, small enough to say in a line."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from eri.layers.flat import Flat
from eri.train import Loss, TrainState

Weights = Mapping[str, nn.Parameter]


def losses(loss: Loss, batch: Any) -> Tensor:
    """The loss of each sample of a micro-batch."""
    return loss(loss.draw(batch))


def state_of(scaling: bool = False, **weights: Tensor) -> TrainState:
    """A fresh state of some parameters."""
    parameters = {name: nn.Parameter(value.clone()) for name, value in weights.items()}
    return TrainState(Flat(parameters), scaling=scaling)


@dataclass
class Rows:
    """Samples that are the rows of a matrix."""

    rows: Tensor

    @property
    def files(self) -> list[str]:
        """Their names."""
        return [f"row {number}" for number in range(len(self))]

    def __len__(self) -> int:
        return len(self.rows)


class LossOf:
    """A loss that is a function of the parameters and of the rows of a micro-batch."""

    def __init__(self, state: TrainState, function: Callable[[Weights, Tensor], Tensor]) -> None:
        self.weights = state.flat.parameters
        self.function = function

    def draw(self, batch: Rows) -> dict[str, Tensor]:
        """The rows."""
        return {"rows": batch.rows}

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.function(self.weights, inputs["rows"])

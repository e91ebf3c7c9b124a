import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from eri.errors import ModelError
from eri.train import OPTIMIZERS, TrainState


def fresh_state(names: tuple[str, ...] = ("a", "b")) -> TrainState:
    torch.manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(3)) for name in names}
    optimizer = OPTIMIZERS["adamw"](parameters.values(), 0.1, 0.01)
    return TrainState(0, parameters, optimizer, GradScaler("cpu", enabled=False))


def advance(state: TrainState, steps: int) -> None:
    for _ in range(steps):
        state.optimizer.zero_grad()
        loss = sum((p - state.step).square().sum() for p in state.parameters.values())
        loss.backward()  # type: ignore[union-attr]
        state.optimizer.step()
        state.step += 1


def copy(source: TrainState, *, leave_out: str | None = None) -> TrainState:
    """A fresh state with what `source` remembers, as a checkpoint would carry it."""
    target = fresh_state()
    tensors = {
        key: value.clone()
        for key, value in source.optimizer_tensors().items()
        if leave_out is None or not key.endswith(leave_out)
    }
    for name, parameter in target.parameters.items():
        parameter.data.copy_(source.parameters[name].data)
    target.load(tensors, source.numbers())
    return target


def weights(state: TrainState) -> torch.Tensor:
    return torch.cat([p.detach() for p in state.parameters.values()])


@pytest.mark.parametrize("cut", [0, 1, 5])
def test_a_state_that_was_carried_over_goes_on_bit_by_bit(cut: int) -> None:
    straight, stopped = fresh_state(), fresh_state()
    advance(straight, 8)
    advance(stopped, cut)
    resumed = copy(stopped)
    advance(resumed, 8 - cut)
    assert resumed.step == straight.step
    assert torch.equal(weights(resumed), weights(straight))


def test_an_optimizer_that_forgets_does_not_go_on_bit_by_bit() -> None:
    straight, stopped = fresh_state(), fresh_state()
    advance(straight, 8)
    advance(stopped, 5)
    forgetful = copy(stopped)
    for value in forgetful.optimizer.state.values():
        value["exp_avg"].zero_()
    advance(forgetful, 3)
    assert not torch.equal(weights(forgetful), weights(straight))


def test_a_state_of_other_parameters_is_refused() -> None:
    source = fresh_state()
    advance(source, 1)
    with pytest.raises(ModelError, match="'b', which does not train"):
        fresh_state(("a",)).load(source.optimizer_tensors(), source.numbers())
    with pytest.raises(ModelError, match="lacks 'c'"):
        fresh_state(("a", "b", "c")).load(source.optimizer_tensors(), source.numbers())


def test_a_state_without_its_step_is_refused() -> None:
    with pytest.raises(ModelError, match="lacks its step"):
        fresh_state().load({}, {"scaler": {}})

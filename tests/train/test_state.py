import json

import pytest
import torch

from eri.errors import ModelError
from eri.layers.adamw import Control
from eri.train import Step, TrainState
from tests.losses import LossOf, Rows, state_of

NO_ROWS = [Rows(torch.zeros(1, 1))]


def fresh_state(names: tuple[str, ...] = ("a", "b"), *, scaling: bool = False) -> TrainState:
    torch.manual_seed(0)
    return state_of(scaling, **{name: torch.randn(3) for name in names})


def advance(state: TrainState, steps: int) -> None:
    def far(weights, rows) -> torch.Tensor:
        distance = sum((weight - state.step).square().sum() for weight in weights.values())
        return distance + rows.sum(1)

    step = Step(state, LossOf(state, far), weight_decay=0.01, max_grad_norm=None)
    for _ in range(steps):
        step(NO_ROWS, 0.1).result()
        state.step += 1


def copy(source: TrainState, **forgotten: float) -> TrainState:
    """A fresh state with what `source` remembers, as a checkpoint would carry it."""
    target = fresh_state(scaling=source.scaling)
    for name, parameter in target.flat.parameters.items():
        parameter.data.copy_(source.flat.parameters[name])
    numbers = json.loads(json.dumps(source.numbers())) | forgotten
    target.load({k: v.clone() for k, v in source.optimizer_tensors().items()}, numbers)
    return target


@pytest.mark.parametrize("cut", [0, 1, 5])
def test_a_state_that_was_carried_over_goes_on_bit_by_bit(cut: int) -> None:
    straight, stopped = fresh_state(), fresh_state()
    advance(straight, 8)
    advance(stopped, cut)
    resumed = copy(stopped)
    advance(resumed, 8 - cut)
    assert resumed.step == straight.step
    assert resumed.numbers() == straight.numbers()
    assert torch.equal(resumed.flat.master, straight.flat.master)


@pytest.mark.parametrize("forgotten", ["exp_avg", "exp_avg_sq", "updates"])
def test_an_optimizer_that_forgets_does_not_go_on_bit_by_bit(forgotten: str) -> None:
    straight, stopped = fresh_state(), fresh_state()
    advance(straight, 8)
    advance(stopped, 5)
    if forgotten == "updates":
        forgetful = copy(stopped, updates=0.0)
    else:
        forgetful = copy(stopped)
        getattr(forgetful.flat, forgotten).zero_()
    advance(forgetful, 3)
    assert not torch.equal(forgetful.flat.master, straight.flat.master)


def test_the_loss_scale_and_its_growth_are_carried_over() -> None:
    source = fresh_state(scaling=True)
    assert source.numbers() == {
        "step": 0,
        "scaling": True,
        "updates": 0,
        "scale": 2**16,
        "growth": 0,
    }
    source.control[Control.SCALE] = 2.0**11
    advance(source, 3)
    assert source.numbers() == {
        "step": 3,
        "scaling": True,
        "updates": 3,
        "scale": 2**11,
        "growth": 3,
    }
    assert copy(source).numbers() == source.numbers()


@pytest.mark.parametrize("before", [False, True])
def test_a_scale_is_not_carried_to_a_loss_of_another_kind(before: bool) -> None:
    source, target = fresh_state(scaling=before), fresh_state(scaling=not before)
    source.control[Control.SCALE] = 4.0
    advance(source, 2)
    expected = target.numbers()
    target.load(source.optimizer_tensors(), source.numbers())
    assert target.numbers() == expected | {"step": 2, "updates": 2}


def test_what_another_version_kept_is_told_as_that() -> None:
    source = fresh_state()
    tensors = source.optimizer_tensors() | {"a/step": torch.zeros(())}
    with pytest.raises(ModelError, match="'step', which this version does not know") as caught:
        fresh_state().load(tensors, source.numbers())
    assert "--restart" in str(caught.value.hint)


def test_without_scaling_the_scale_stays_one() -> None:
    state = fresh_state()
    advance(state, 2)
    assert state.numbers() == {"step": 2, "scaling": False, "updates": 2, "scale": 1, "growth": 0}


def test_what_the_optimizer_keeps_is_named_after_the_parameters() -> None:
    state = fresh_state()
    advance(state, 1)
    tensors = state.optimizer_tensors()
    assert set(tensors) == {f"{name}/{key}" for name in "ab" for key in ("exp_avg", "exp_avg_sq")}
    assert all(tensor.shape == (3,) and tensor.all() for tensor in tensors.values())


def test_a_state_of_other_parameters_is_refused() -> None:
    source = fresh_state()
    advance(source, 1)
    with pytest.raises(ModelError, match="'b', which does not train"):
        fresh_state(("a",)).load(source.optimizer_tensors(), source.numbers())
    with pytest.raises(ModelError, match="lacks 'c"):
        fresh_state(("a", "b", "c")).load(source.optimizer_tensors(), source.numbers())


@pytest.mark.parametrize("name", ["step", "updates", "scale", "growth"])
def test_a_state_without_one_of_its_numbers_is_refused(name: str) -> None:
    source, target = fresh_state(), fresh_state()
    advance(source, 1)
    numbers = source.numbers()
    del numbers[name]
    with pytest.raises(ModelError, match=f"lacks its {name}"):
        target.load(source.optimizer_tensors(), numbers)

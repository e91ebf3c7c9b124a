from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from eri.errors import NonFiniteError
from eri.train import OPTIMIZERS, TrainState, update


@dataclass
class Rows:
    rows: Tensor

    @property
    def files(self) -> list[str]:
        return ["row"] * len(self)

    def __len__(self) -> int:
        return len(self.rows)


def fresh_state(lr: float = 0.1) -> TrainState:
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = OPTIMIZERS["adamw"]([weight], lr, 0.01)
    return TrainState(0, {"weight": weight}, optimizer, GradScaler("cpu", enabled=False))


def loss_of(state: TrainState):
    return lambda batch: (batch.rows @ state.parameters["weight"]).square()


ROWS = torch.tensor([[1.0, 0.5], [0.0, 2.0], [3.0, 1.0], [0.5, 0.5], [1.0, 1.0]])


def test_micro_batches_of_any_size_add_up_to_the_whole_batch() -> None:
    whole, split = fresh_state(), fresh_state()
    one = update(whole, loss_of(whole), [Rows(ROWS)], 1.0)
    many = update(split, loss_of(split), [Rows(ROWS[:2]), Rows(ROWS[2:3]), Rows(ROWS[3:])], 1.0)
    assert many.loss == pytest.approx(one.loss, rel=1e-6)
    assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-6)
    assert many.samples == one.samples == 5
    torch.testing.assert_close(split.parameters["weight"], whole.parameters["weight"])


def test_the_gradient_is_clipped_to_the_norm_and_reported_as_it_was() -> None:
    state = fresh_state()
    numbers = update(state, loss_of(state), [Rows(ROWS)], 0.5)
    gradient = state.parameters["weight"].grad
    assert gradient is not None
    assert numbers.grad_norm > 0.5
    assert gradient.norm().item() == pytest.approx(0.5, rel=1e-4)


def test_without_a_limit_nothing_is_clipped() -> None:
    state = fresh_state()
    numbers = update(state, loss_of(state), [Rows(ROWS)], None)
    gradient = state.parameters["weight"].grad
    assert gradient is not None
    assert gradient.norm().item() == pytest.approx(numbers.grad_norm)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(bad: float) -> None:
    state = fresh_state()
    before = state.parameters["weight"].detach().clone()
    with pytest.raises(NonFiniteError, match=r"loss is (nan|inf)"):
        update(state, lambda batch: loss_of(state)(batch) * bad, [Rows(ROWS)], 1.0)
    assert torch.equal(state.parameters["weight"], before)


def test_a_gradient_that_is_not_finite_stops_before_the_update() -> None:
    state = fresh_state()
    before = state.parameters["weight"].detach().clone()
    with pytest.raises(NonFiniteError, match="gradient"):  # √0 has slope ∞ and value 0
        update(state, lambda batch: (state.parameters["weight"] * 0).sqrt(), [Rows(ROWS)], 1.0)
    assert torch.equal(state.parameters["weight"], before)

import pytest
import torch
from torch import Tensor

from eri.errors import NonFiniteError
from eri.layers.adamw import Control
from eri.layers.flat import Flat
from eri.train import Step, TrainState
from tests.losses import LossOf, Rows, Weights, state_of

ROWS = torch.tensor([[1.0, 0.5], [0.0, 2.0], [3.0, 1.0], [0.5, 0.5], [1.0, 1.0]])
BETA1 = 0.9
LR = 0.1


def fresh_state(scaling: bool = False) -> TrainState:
    return state_of(scaling, weight=torch.tensor([1.0, -2.0]))


def squares(weights: Weights, rows: Tensor) -> Tensor:
    return (rows @ weights["weight"]).square()


def step_of(state: TrainState, function=squares, limit: float | None = 1.0, decay=0.01) -> Step:
    return Step(state, LossOf(state, function), weight_decay=decay, max_grad_norm=limit)


def clipped(state: TrainState) -> Tensor:
    """The gradient that the first update took: it is all that the first moment knows."""
    return state.flat.exp_avg[:2] / (1 - BETA1)


def everything(flat: Flat) -> Tensor:
    """All that an update changes."""
    return torch.cat([flat.master, flat.exp_avg, flat.exp_avg_sq])


def test_micro_batches_of_any_size_add_up_to_the_whole_batch() -> None:
    whole, split = fresh_state(), fresh_state()
    one = step_of(whole)([Rows(ROWS)], LR).result()
    many = step_of(split)([Rows(ROWS[:2]), Rows(ROWS[2:3]), Rows(ROWS[3:])], LR).result()
    assert many.loss == pytest.approx(one.loss, rel=1e-6)
    assert many.loss == pytest.approx((ROWS @ torch.tensor([1.0, -2.0])).square().mean().item())
    assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-6)
    assert many.samples == one.samples == 5
    torch.testing.assert_close(split.flat.master, whole.flat.master)
    torch.testing.assert_close(clipped(split), clipped(whole))


def test_each_update_is_from_its_own_gradients() -> None:
    state = fresh_state()
    step = step_of(state)
    rest = [step([Rows(ROWS)], 0.0).result() for _ in range(2)]  # at a rate of 0 nothing moves
    assert rest[0] == rest[1]


def test_updates_are_those_of_pytorch() -> None:
    state = fresh_state()
    theirs = torch.tensor([1.0, -2.0], requires_grad=True)
    optimizer = torch.optim.AdamW([theirs], lr=LR, weight_decay=0.5)
    step = step_of(state, decay=0.5)
    for rate in (LR, LR / 2, LR / 4):
        numbers = step([Rows(ROWS[:2]), Rows(ROWS[2:])], rate).result()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = rate
        squares({"weight": theirs}, ROWS).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        optimizer.step()
        assert numbers.grad_norm == pytest.approx(norm.item())
        torch.testing.assert_close(state.flat.master[:2], theirs.detach())


def test_weights_decay_apart_from_the_gradient() -> None:
    state = fresh_state()
    before = state.flat.master.clone()
    step_of(state, lambda w, rows: 0 * squares(w, rows), decay=0.5)([Rows(ROWS)], LR).result()
    torch.testing.assert_close(state.flat.master, before * (1 - LR * 0.5))


def test_the_gradient_is_clipped_to_the_norm_and_reported_as_it_was() -> None:
    state = fresh_state()
    numbers = step_of(state, limit=0.5)([Rows(ROWS)], LR).result()
    assert numbers.grad_norm > 0.5
    assert clipped(state).norm().item() == pytest.approx(0.5, rel=1e-4)


def test_without_a_limit_nothing_is_clipped() -> None:
    state = fresh_state()
    numbers = step_of(state, limit=None)([Rows(ROWS)], LR).result()
    assert clipped(state).norm().item() == pytest.approx(numbers.grad_norm)


def test_a_state_learns_the_new_rate_and_not_its_step() -> None:
    state = fresh_state()
    pending = step_of(state)([Rows(ROWS[:2]), Rows(ROWS[2:])], 0.25)
    assert pending.step == 1
    assert pending.files == ["row 0", "row 1", "row 0", "row 1", "row 2"]
    assert state.control[Control.LR] == 0.25
    assert state.step == 0  # the loop counts


def test_a_step_that_is_asked_late_tells_its_own_numbers() -> None:
    early, late = step_of(fresh_state()), step_of(fresh_state())
    asked = [early([Rows(ROWS)], LR).result() for _ in range(3)]
    pending = [late([Rows(ROWS)], LR) for _ in range(3)]
    assert [one.result() for one in pending] == asked
    assert len({numbers.loss for numbers in asked}) == 3


def plus(number: float):
    return lambda weights, rows: squares(weights, rows) + number  # its gradient is finite


def steep(weights: Weights, rows: Tensor) -> Tensor:
    return (weights["weight"] * 0).sqrt() + 0 * rows.sum()  # √0 has slope ∞ and value 0


BAD = {
    "nan": (plus(float("nan")), r"loss is nan"),
    "inf": (plus(float("inf")), r"loss is inf"),
    "gradient": (steep, r"loss is [0-9.]+ and the gradient's norm (nan|inf)"),
}


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(("function", "message"), BAD.values(), ids=BAD)
def test_what_is_not_finite_stops_before_the_update(function, message: str, place: int) -> None:
    state = fresh_state()
    step_of(state)([Rows(ROWS)], LR).result()
    before, updates = everything(state.flat), state.control[Control.UPDATES].item()
    state.step = 7
    batches = [Rows(ROWS[:1]), Rows(ROWS[1:2])]
    functions = [squares, squares]
    functions[place] = function
    turns = iter(functions)
    step = step_of(state, lambda weights, rows: next(turns)(weights, rows))
    with pytest.raises(NonFiniteError, match=message) as error:
        step(batches, LR).result()
    assert error.value.where == "step 8"
    assert error.value.problems == ("row 0", "row 0")
    assert torch.equal(everything(state.flat), before)
    assert state.control[Control.UPDATES] == updates == 1


def test_after_a_step_that_was_not_finite_nothing_is_updated() -> None:
    state = fresh_state()
    good, bad = step_of(state), step_of(state, plus(float("nan")))
    pending = [good([Rows(ROWS)], LR)]
    after = everything(state.flat)
    for step in (bad, good, good):
        state.step += 1
        pending.append(step([Rows(ROWS)], LR))
    assert torch.equal(everything(state.flat), after)
    assert not state.flat.grad.any()
    assert state.control[Control.BAD] == 2
    assert pending[0].result().loss > 0  # what came before it has its numbers
    with pytest.raises(NonFiniteError, match="loss is nan") as error:
        pending[1].result()
    assert error.value.where == "step 2"
    for later in pending[2:]:
        with pytest.raises(NonFiniteError):
            later.result()


def test_a_loss_that_is_scaled_learns_the_same() -> None:
    plain, scaled = fresh_state(), fresh_state(scaling=True)
    assert scaled.control[Control.SCALE] == 2**16
    for _ in range(3):
        numbers = [step_of(state)([Rows(ROWS)], LR).result() for state in (plain, scaled)]
        assert numbers[0] == numbers[1]
    assert torch.equal(scaled.flat.master, plain.flat.master)  # powers of two round nothing


def half(weights: Weights, rows: Tensor) -> Tensor:
    """A loss whose backward pass goes through fp16, which ends at 65504."""
    return (rows @ weights["weight"]).half().square().float()


def test_an_overflow_halves_the_scale_and_takes_one_update() -> None:
    state = fresh_state(scaling=True)
    before = everything(state.flat)
    step = step_of(state, half)
    numbers = []
    while not state.control[Control.UPDATES]:
        assert torch.equal(everything(state.flat), before)
        numbers.append(step([Rows(8 * ROWS)], LR).result())
        assert len(numbers) < 20
    *skipped, done = numbers
    assert len(skipped) > 1
    assert state.control[Control.SCALE] == 2.0 ** (16 - len(skipped))
    assert not torch.tensor([one.grad_norm for one in skipped]).isfinite().any()
    plain = fresh_state()
    wanted = step_of(plain)([Rows(8 * ROWS)], LR).result()
    assert done.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-2)
    torch.testing.assert_close(state.flat.master, plain.flat.master, rtol=1e-3, atol=1e-3)


def test_a_scale_cannot_be_blamed_for_a_loss_that_is_not_finite() -> None:
    state = fresh_state(scaling=True)
    with pytest.raises(NonFiniteError, match="loss is inf"):
        step_of(state, plus(float("inf")))([Rows(ROWS)], LR).result()
    assert state.control[Control.SCALE] == 2**16

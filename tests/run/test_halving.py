from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from eri.errors import ConfigError, MemoryLimitError
from eri.layers import adamw
from eri.run.halving import Halving
from eri.run.memory_plan import Mode
from eri.run.micro_batch import Sample, SampleBatch
from eri.train import Step, TrainState
from tests.losses import state_of

LR = 0.1


class Squares:
    """A loss that runs out of memory where more samples than fit are asked for at once."""

    def __init__(self, state: TrainState, fits: int = 100) -> None:
        self.weight = state.flat.parameters["weight"]
        self.fits = fits
        self.sizes: list[int] = []  # asked for

    def draw(self, batch: SampleBatch) -> dict[str, Tensor]:
        return {"rows": torch.stack([sample.mean for sample in batch.samples])}

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        rows = inputs["rows"]
        self.sizes.append(len(rows))
        losses = (rows @ self.weight).square()
        if len(rows) > self.fits:
            losses.sum().backward()  # what is left of it must not count
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses


class Begun:
    """A state, its loss, and what begins its steps."""

    def __init__(self, fits: int = 100, *, mode: Mode = "auto", at_once: int | None = None) -> None:
        self.state = state_of(weight=torch.tensor([1.0, -2.0]))
        self.loss = Squares(self.state, fits)
        self.said: list[str] = []
        step = Step(self.state, self.loss, weight_decay=0.01, max_grad_norm=1.0)
        self.halved: list[int] = []
        self.begin = Halving(
            step, mode=mode, at_once=at_once, say=self.said.append, halved=self.halved.append
        )

    def take(self, *sizes: int) -> float:
        loss = self.begin(batches(*sizes), LR).result().loss
        self.state.step += 1
        return loss


def batches(*sizes: int) -> list[SampleBatch]:
    draws = torch.Generator().manual_seed(0)
    found, number = [], 0
    for size in sizes:
        samples = [
            Sample(f"{n}.png", torch.randn(2, generator=draws), torch.zeros(2), torch.zeros(1))
            for n in range(number, number + size)
        ]
        found.append(SampleBatch(samples, range(number, number + size)))
        number += size
    return found


@pytest.mark.parametrize(("fits", "tried"), [(3, [5, 3, 2]), (4, [5, 3, 2])])
def test_a_step_that_does_not_fit_is_taken_in_halves(fits: int, tried: list[int]) -> None:
    short, enough = Begun(fits), Begun()
    assert short.take(5) == pytest.approx(enough.take(5), rel=1e-6)
    assert short.loss.sizes == tried
    torch.testing.assert_close(short.state.flat.master, enough.state.flat.master)
    torch.testing.assert_close(short.state.flat.exp_avg_sq, enough.state.flat.exp_avg_sq)
    assert short.state.control.tolist() == pytest.approx(enough.state.control.tolist(), rel=1e-6)


def test_it_is_bit_by_bit_a_step_that_was_so_divided_from_the_start() -> None:
    short, divided = Begun(3), Begun(at_once=3)
    for _ in range(3):
        assert short.take(5, 4) == divided.take(5, 4)
        assert torch.equal(short.state.flat.master, divided.state.flat.master)
    assert divided.loss.sizes == [3, 2, 3, 1] * 3
    assert not divided.said


def test_the_size_is_kept_and_said_once() -> None:
    short = Begun(2)
    for _ in range(3):
        short.take(4)
    assert short.loss.sizes == [4, 2, 2, 2, 2, 2, 2]
    assert short.said == [
        "warning: out of memory in step 1; going on with 2 images at once, and with as many in a "
        "step as before"
    ]
    assert short.begin.at_once == 2 and short.halved == [2]


def test_what_no_longer_fits_later_is_halved_again() -> None:
    short = Begun(2)
    short.take(4)
    short.loss.fits = 1
    short.take(4)
    assert short.begin.at_once == 1
    assert [line.partition("with ")[2][:7] for line in short.said] == ["2 image", "1 image"]


@pytest.mark.parametrize(
    ("mode", "setting"), [("auto", "train.memory: small"), ("small", "data.resolution")]
)
def test_a_second_failure_ends_it_and_the_state_is_as_it_was(mode: Mode, setting: str) -> None:
    short = Begun(1, mode=mode)
    before = short.state.flat.master.clone()
    with pytest.raises(MemoryLimitError, match="and again with 2 images at once") as error:
        short.take(4)
    assert error.value.where == "step 1" and setting in str(error.value.hint)
    assert error.value.__cause__ is None  # its frames would hold what the step took
    assert short.state.whole and torch.equal(short.state.flat.master, before)
    assert not short.state.flat.grad.any()
    assert short.loss.sizes == [4, 2]


def test_one_image_is_tried_once_more_because_memory_was_freed() -> None:
    short = Begun(0)
    made = short.begin.step.make_room

    def make_room() -> None:
        short.loss.fits = 1
        made()

    short.begin.step.make_room = make_room  # type: ignore[method-assign]
    short.take(1)
    assert short.loss.sizes == [1, 1]


def test_an_update_that_has_begun_is_not_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = Begun()
    calls = []

    def half(*settings: object, **more: object) -> None:
        calls.append(1)
        begun.state.flat.master.add_(1)
        raise MemoryError

    monkeypatch.setattr(adamw, "_in_order", half)
    with pytest.raises(MemoryLimitError, match="within the update, which is not saved"):
        begun.take(4)
    assert len(calls) == 1 and not begun.state.whole


@pytest.mark.parametrize("error", [ValueError("a shape"), ConfigError("a setting")])
def test_other_errors_are_not_of_memory(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    begun = Begun()

    def wrong(*given: object) -> Callable[..., None]:
        raise error

    monkeypatch.setattr(begun.loss, "draw", wrong)
    with pytest.raises(type(error)):
        begun.take(4)
    assert begun.begin.at_once is None

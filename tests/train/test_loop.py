import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from eri.errors import NonFiniteError
from eri.layers.adamw import Control
from eri.train import Log, Pending, Plan, Step, StepNumbers, train
from eri.train.loop import AHEAD
from tests.losses import state_of

PLAN = Plan(steps=6, lr=0.1, schedule="linear", warmup=0, sample_every=3, save_every=2)


class Micro:
    def __init__(self, number: int) -> None:
        self.files = [str(number)]

    def __len__(self) -> int:
        return 1


@dataclass(frozen=True)
class Told(Pending):
    """A pending step that tells when it is waited for."""

    asked: list[str]

    def is_done(self) -> bool:
        return False  # as far as anybody knows, on a device

    def result(self) -> StepNumbers:
        self.asked.append(f"wait {self.step}")
        return super().result()


class Recorder:
    """What a loop asked for, in its order."""

    def __init__(
        self,
        path: Path,
        *,
        stop_at: int | None = None,
        step: int = 0,
        short: int | None = None,
        bad: int | None = None,
    ) -> None:
        self.asked: list[str] = []
        self.waited: list[str] = []  # the same, with what was waited for
        self.short = short  # a step of one micro-batch instead of two
        self.bad = bad  # a step whose loss is not finite
        self.stop_at = stop_at
        self.state = state_of(weight=torch.tensor([1.0]))
        self.state.step = step
        self.step = Step(self.state, self, weight_decay=0.0, max_grad_norm=1.0)
        self.rates: list[float] = []
        self.path = path

    def tell(self, line: str) -> None:
        self.asked.append(line)
        self.waited.append(line)

    def batches(self, step: int) -> list[Micro]:
        self.tell(f"step {step}")
        return [Micro(number) for number in range(1 if step == self.short else 2)]

    def draw(self, batch: Micro) -> Mapping[str, torch.Tensor]:
        factor = torch.tensor([1.0 if self.state.step + 1 != self.bad else torch.nan])
        return {"factor": factor}

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        self.rates.append(self.state.control[Control.LR].item())
        return self.state.flat.parameters["weight"].square() * inputs["factor"]

    def begin(self, batches: Sequence[Micro], lr: float) -> Pending:
        pending = self.step(batches, lr)
        known = {field.name: getattr(pending, field.name) for field in fields(pending)}
        return Told(**known, asked=self.waited)

    def run(self, plan: Plan) -> list[str]:
        console = Console(file=io.StringIO())
        with Log(self.path, steps=plan.steps, step=self.state.step, console=console) as log:
            train(
                plan,
                self.state,
                step=self.begin,  # type: ignore[arg-type]
                batches=self.batches,
                log=log,
                sample=lambda step: self.tell(f"sample {step}"),
                save=lambda: self.tell(f"save {self.state.step}"),
                stop=lambda: self.stop_at is not None and self.state.step >= self.stop_at,
            )
        return self.asked

    def logged(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


def test_a_run_from_its_start_to_its_end(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "log.jsonl")
    asked = recorder.run(PLAN)
    assert [line for line in asked if "step" in line] == [f"step {n}" for n in range(6)]
    others = [line for line in asked if "step" not in line]
    assert others == ["save 2", "sample 3", "save 4", "save 6", "sample 6", "save 6"]
    assert recorder.state.step == 6
    assert [line["step"] for line in recorder.logged()] == [1, 2, 3, 4, 5, 6]


def test_the_host_may_be_two_steps_ahead_and_no_more(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "log.jsonl")
    recorder.run(replace(PLAN, sample_every=0, save_every=100, steps=5))
    assert AHEAD == 2
    begun = ["step 0", "step 1", "step 2", "wait 1", "step 3", "wait 2", "step 4", "wait 3"]
    assert recorder.waited == [*begun, "wait 4", "wait 5", "save 5", "save 5"]


def test_before_anything_is_saved_or_drawn_every_step_is_known(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "log.jsonl", stop_at=5)
    recorder.run(PLAN)
    known = 0
    for line in recorder.waited:
        kind, number = line.split()
        if kind == "wait":
            known = int(number)
        elif kind in {"save", "sample"}:
            assert known == int(number)
    assert recorder.waited[-2:] == ["wait 5", "save 5"]


def test_the_rate_follows_the_schedule(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "log.jsonl")
    recorder.run(PLAN)
    wanted = [0.1 * (1 - step / 6) for step in range(6)]
    assert len(recorder.rates) == 12
    assert recorder.rates[::2] == pytest.approx(wanted)
    assert [line["lr"] for line in recorder.logged()] == pytest.approx(wanted)


def test_a_resumed_run_asks_for_what_comes_next(tmp_path: Path) -> None:
    asked = Recorder(tmp_path / "log.jsonl", step=4).run(PLAN)
    assert asked[:2] == ["step 4", "step 5"]


def test_a_step_may_have_fewer_micro_batches(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "log.jsonl", step=4, short=5)
    recorder.run(PLAN)
    assert [line["files"] for line in recorder.logged()] == [["0", "1"], ["0"]]


def test_asked_to_stop_it_finishes_the_step_and_saves(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "log.jsonl", stop_at=3)
    assert recorder.run(PLAN)[-3:] == ["step 2", "sample 3", "save 3"]
    assert [line["step"] for line in recorder.logged()] == [1, 2, 3]


def test_a_finished_state_asks_for_nothing(tmp_path: Path) -> None:
    assert Recorder(tmp_path / "log.jsonl", step=6).run(PLAN) == ["save 6"]


@pytest.mark.parametrize("bad", range(1, 7))
@pytest.mark.parametrize("save_every", [2, 100])
def test_the_log_ends_before_a_step_that_was_not_finite_and_it_is_not_saved(
    tmp_path: Path, bad: int, save_every: int
) -> None:
    recorder = Recorder(tmp_path / "log.jsonl", bad=bad)
    with pytest.raises(NonFiniteError) as error:
        recorder.run(replace(PLAN, sample_every=0, save_every=save_every))
    assert error.value.where == f"step {bad}"
    assert error.value.problems == ("0", "1")
    lines = recorder.logged()
    assert [line["step"] for line in lines] == list(range(1, bad))
    assert len({line["loss"] for line in lines}) == bad - 1  # each its own
    saved = [int(line.split()[1]) for line in recorder.asked if line.startswith("save")]
    assert saved == list(range(save_every, bad, save_every))
    assert recorder.state.control[Control.UPDATES] == bad - 1  # nor did a later step change it


def test_asked_to_stop_after_a_step_that_was_not_finite_it_saves_nothing(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "log.jsonl", bad=2, stop_at=3)
    with pytest.raises(NonFiniteError):
        recorder.run(replace(PLAN, sample_every=0, save_every=100))
    assert not [line for line in recorder.asked if line.startswith("save")]


def test_a_step_that_is_done_is_told_of_before_the_next_begins(tmp_path: Path) -> None:
    """Otherwise the time of a step would be that of another, and the speed of a run wrong."""
    recorder, told = Recorder(tmp_path / "log.jsonl"), []
    console = Console(file=io.StringIO())
    with Log(recorder.path, steps=6, step=0, console=console) as log:
        write = log.step

        def step(pending: Pending, *rest: StepNumbers, **others: float) -> None:
            told.append((pending.step, recorder.state.step))
            write(pending, *rest, **others)

        log.step = step  # type: ignore[method-assign]
        train(
            PLAN,
            recorder.state,
            step=recorder.step,
            batches=recorder.batches,
            log=log,
            sample=lambda step: None,
            save=lambda: None,
            stop=lambda: False,
        )
    assert told == [(n, n) for n in range(1, 7)]

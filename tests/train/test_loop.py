import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.amp import GradScaler

from eri.train import OPTIMIZERS, Log, Plan, TrainState, train

PLAN = Plan(
    steps=6,
    lr=0.1,
    schedule="linear",
    warmup=0,
    max_grad_norm=1.0,
    sample_every=3,
    save_every=2,
)


class Micro:
    def __init__(self, number: int) -> None:
        self.number = number
        self.files = [str(number)]

    def __len__(self) -> int:
        return 1


class Recorder:
    """What a loop asked for, in its order."""

    def __init__(
        self, path: Path, *, stop_at: int | None = None, step: int = 0, short: int | None = None
    ) -> None:
        self.asked: list[str] = []
        self.short = short  # a step of one micro-batch instead of two
        self.stop_at = stop_at
        weight = nn.Parameter(torch.tensor([1.0]))
        optimizer = OPTIMIZERS["adamw"]([weight], 0.1, 0.0)
        scaler = GradScaler("cpu", enabled=False)
        self.state = TrainState(step, {"weight": weight}, optimizer, scaler)
        self.rates: list[float] = []
        self.path = path

    def batches(self, step: int) -> list[Micro]:
        self.asked.append(f"step {step}")
        return [Micro(number) for number in range(1 if step == self.short else 2)]

    def loss(self, batch: Micro) -> torch.Tensor:
        self.rates.append(self.state.optimizer.param_groups[0]["lr"])
        return self.state.parameters["weight"].square()

    def run(self, plan: Plan) -> list[str]:
        console = Console(file=io.StringIO())
        with Log(self.path, steps=plan.steps, step=self.state.step, console=console) as log:
            train(
                plan,
                self.state,
                loss=self.loss,
                batches=self.batches,
                log=log,
                sample=lambda step: self.asked.append(f"sample {step}"),
                save=lambda: self.asked.append(f"save {self.state.step}"),
                stop=lambda: self.stop_at is not None and self.state.step >= self.stop_at,
            )
        return self.asked


def test_a_run_from_its_start_to_its_end(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "log.jsonl")
    asked = recorder.run(PLAN)
    assert [line for line in asked if "step" in line] == [f"step {n}" for n in range(6)]
    others = [line for line in asked if "step" not in line]
    assert others == ["save 2", "sample 3", "save 4", "save 6", "sample 6", "save 6"]
    assert recorder.state.step == 6


def test_the_rate_follows_the_schedule(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "log.jsonl")
    recorder.run(PLAN)
    assert len(recorder.rates) == 12
    assert recorder.rates[::2] == pytest.approx([0.1 * (1 - step / 6) for step in range(6)])


def test_a_resumed_run_asks_for_what_comes_next(tmp_path: Path) -> None:
    asked = Recorder(tmp_path / "log.jsonl", step=4).run(PLAN)
    assert asked[:2] == ["step 4", "step 5"]


def test_a_step_may_have_fewer_micro_batches(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "log.jsonl", step=4, short=5)
    recorder.run(PLAN)
    lines = recorder.path.read_text(encoding="utf-8").splitlines()
    assert [len(json.loads(line)["files"]) for line in lines] == [2, 1]


def test_asked_to_stop_it_finishes_the_step_and_saves(tmp_path: Path) -> None:
    asked = Recorder(tmp_path / "log.jsonl", stop_at=3).run(PLAN)
    assert asked[-3:] == ["step 2", "sample 3", "save 3"]


def test_a_finished_state_asks_for_nothing(tmp_path: Path) -> None:
    assert Recorder(tmp_path / "log.jsonl", step=6).run(PLAN) == ["save 6"]

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eri.config import Config
from eri.run.base import look_at
from eri.run.dataset import look_at_images
from eri.run.identity import identity_of, made_with, resolved
from eri.run.plan import plan_run
from eri.run.prediction import choose
from tests.run.conftest import Screen


@pytest.fixture
def settled(screen: Screen) -> Callable[[Config], tuple[dict[str, object], Config]]:
    """What makes the numbers of a run, and its settings with nothing left to be worked out."""

    def both(config: Config) -> tuple[dict[str, object], Config]:
        facts = look_at(config.model)
        choice = choose(config.model, facts.hint)
        images = look_at_images(config, facts, screen.console, lambda: None)
        plan = plan_run(config, facts, choice, images, dry_run=True)
        return identity_of(config, facts, images, plan), resolved(config, plan, choice)

    return both


def test_where_things_lie_makes_no_number_and_what_they_are_does(
    config: Config, change: Callable[..., Config], settled: Callable, tmp_path: Path
) -> None:
    before, _ = settled(config)
    (source,) = config.data
    moved = source.path.rename(tmp_path / "moved")
    elsewhere = change(config, data=(source.model_copy(update={"path": moved}),))
    assert settled(elsewhere)[0] == before
    (moved / "0.txt").write_text("another caption")
    assert settled(elsewhere)[0]["images"] != before["images"]
    assert settled(change(elsewhere, train={"seed": 7}))[0]["train.seed"] == 7


def test_what_computes_is_told_with_its_versions() -> None:
    found = made_with(torch.device("cpu"))
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found.keys() == {"eri", "python", "torch", "safetensors", "threads", "device"}
    assert json.loads(json.dumps(found)) == found


def test_the_last_step_makes_numbers_where_the_rate_hangs_on_it(
    config: Config, change: Callable[..., Config], settled: Callable
) -> None:
    assert "train.steps" not in settled(change(config, train={"schedule": "constant"}))[0]
    assert settled(change(config, train={"schedule": "cosine"}))[0]["train.steps"] == 4


def test_nothing_is_left_to_be_worked_out(
    config: Config,
    change: Callable[..., Config],
    settled: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(config.output.parent)
    relative = change(config, output=Path("disc"), train={"steps": "auto"})
    _, found = settled(relative)
    assert found.output == config.output and found.data == config.data
    assert isinstance(found.train.steps, int)

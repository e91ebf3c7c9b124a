import json
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from eri.config import Config
from eri.run import validation
from eri.run.objective import Objective, Sample, ValidationLoss
from eri.run.train import train
from tests.run.conftest import Screen


def losses(run: Path) -> dict:
    return json.loads((run / "validation.json").read_text())


def test_both_ends_are_recorded_and_compared(finished: Path) -> None:
    record = losses(finished)
    assert record["before"]["mean"] != record["after"]["mean"]
    assert len(record["after"]["thirds"]) == 3


def test_the_start_survives_a_resume_and_the_comparison_is_told(
    config: Config, change: Callable[..., Config], screen: Screen
) -> None:
    train(config, screen.console)
    start = losses(config.output)["before"]
    train(change(config, train={"steps": 5}), screen.console)
    assert losses(config.output)["before"] == start
    before, after = start["mean"], losses(config.output)["after"]["mean"]
    told = f"{before:.4f} before, {after:.4f} after ({100 * (after / before - 1):+.1f} %)"
    assert told in screen.text


@pytest.mark.parametrize("lost", ["other images", "half a file"])
def test_a_start_that_is_lost_or_of_other_images_is_measured_without_the_adapter(
    config: Config, change: Callable[..., Config], screen: Screen, lost: str
) -> None:
    train(config, screen.console)
    start = losses(config.output)["before"]
    path = config.output / "validation.json"
    text = path.read_text()
    path.write_text(
        text.replace('"images": "', '"images": "x') if lost == "other images" else text[:50]
    )
    train(change(config, train={"steps": 5}), screen.console)
    assert losses(config.output)["before"]["mean"] == pytest.approx(start["mean"], rel=1e-6)


def test_without_held_out_images_nothing_is_measured(
    config: Config, change: Callable[..., Config], screen: Screen
) -> None:
    source = config.data[0].model_copy(update={"validation": None})
    train(change(config, data=(source,), train={"steps": 1}), screen.console)
    assert "held-out" not in screen.text
    assert not (config.output / "validation.json").exists()


def test_without_the_adapter_the_loss_is_that_of_the_base(
    config: Config, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    right = validation.validate

    def with_zero(
        objective: Objective, samples: Sequence[Sample], *, at_once: int
    ) -> ValidationLoss:
        loss = right(objective, samples, at_once=at_once)
        for name, parameter in objective.unet.named_parameters():
            if "lora_b" in name:
                torch.nn.init.zeros_(parameter)
        measured.append((loss, right(objective, samples, at_once=at_once)))
        return loss

    monkeypatch.setattr(validation, "validate", with_zero)
    train(config, screen.console)
    (start, _), (end, zeroed) = measured
    assert zeroed == start
    assert end != start


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_null_and_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: float
) -> None:
    found = iter([ValidationLoss(loss, (1.0, loss, 2.0)), ValidationLoss(1.0, (1.0, 1.0, 1.0))])
    monkeypatch.setattr(validation, "validate", lambda *given, **more: next(found))
    measured = validation.Validation(tmp_path, MagicMock(), "images", at_once=1)
    measured.before()
    text = (tmp_path / "validation.json").read_text()
    record = json.loads(text, parse_constant=pytest.fail)
    assert record["before"] == {"mean": None, "thirds": [1.0, None, 2.0]}
    assert measured.before().mean == 1.0


def test_without_memory_for_it_the_adapter_is_at_its_strength_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = MagicMock()
    monkeypatch.setattr(validation, "validate", MagicMock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        validation.Validation(tmp_path, parts, "images", at_once=1).before()
    assert [call.args for call in parts.adapter.set_strength.call_args_list] == [(0,), (1,)]

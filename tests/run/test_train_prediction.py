"""A run, and what its base model predicts: told, measured once, written down, remembered."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eri.config import Config, load_config
from eri.errors import ConfigError, ModelError, Stopped
from eri.formats.header import read_header
from eri.run.base import BaseFacts, look_at
from eri.run.probe import Verdict
from eri.run.train import train
from tests.run.conftest import Screen
from tests.run.test_train import Change, digest, stop_after


def measure(
    monkeypatch: pytest.MonkeyPatch,
    prediction: str,
    zero_snr: bool = False,
    *,
    told: bool = False,
) -> list[str]:
    """Make the base model seem to predict this; without `told`, its files say nothing.

    Returns:
        What was measured, as it is measured.
    """
    asked: list[str] = []

    def verdict(question: str, answer: object) -> Callable[..., Verdict]:
        def ask(*subjects: object, at_once: int) -> Verdict:
            asked.append(question)
            return Verdict(answer, f"{question} as measured")

        return ask

    def look(*arguments: Any) -> BaseFacts:
        facts = look_at(*arguments)
        return facts if told else replace(facts, hint=None)

    monkeypatch.setattr("eri.run.prediction.probe_prediction", verdict("target", prediction))
    monkeypatch.setattr("eri.run.prediction.probe_zero_snr", verdict("schedule", zero_snr))
    monkeypatch.setattr("eri.run.train.look_at", look)
    return asked


def test_what_the_files_say_is_told_in_the_plan(bare: Config, screen: Screen) -> None:
    train(bare, screen.console, dry_run=True)
    assert "prediction epsilon: its scheduler_config.json" in screen.text


def test_a_dry_run_says_that_it_will_be_measured_and_does_not(
    bare: Config, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = measure(monkeypatch, "v_prediction")
    train(bare, screen.console, dry_run=True)
    assert "prediction not told by the files; measured before step 1" in screen.text
    assert asked == []


def test_what_was_measured_is_trained_written_down_and_remembered(
    bare: Config, screen: Screen, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    v = {"prediction": "v", "zero_terminal_snr": True}
    by_key = change(bare, output=bare.output.with_name("key"), model=v)
    train(by_key, screen.console)
    with monkeypatch.context() as patch:
        asked = measure(patch, "v_prediction", zero_snr=True)
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            train(bare, screen.console)
        assert asked == ["target", "schedule"]
    assert "prediction v with zero-terminal SNR: measured, target as measured" in screen.text
    assert load_config(bare.output / "config.yaml").model == change(bare, model=v).model
    with monkeypatch.context() as patch:  # a net that now seems to predict something else
        asked = measure(patch, "epsilon")
        train(bare, screen.console)
        assert asked == []
        assert "going on from step 2" in screen.text
    assert digest(bare.output) == digest(by_key.output)
    metadata = read_header(bare.output / "disc.safetensors").metadata
    assert metadata["modelspec.prediction_type"] == "v"
    assert metadata["ss_zero_terminal_snr"] == "True"


def test_what_a_net_predicts_makes_a_difference(
    bare: Config, screen: Screen, change: Change, finished: Path
) -> None:
    train(change(bare, model={"prediction": "v"}), screen.console)
    assert digest(bare.output) != digest(finished)
    assert "prediction v: model.prediction" in screen.text


def test_a_model_that_is_not_what_its_files_say_is_refused(
    bare: Config, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(monkeypatch, "v_prediction", told=True)
    with pytest.raises(ModelError, match=r"scheduler_config\.json says .* epsilon") as refused:
        train(bare, screen.console)
    assert refused.value.exit_code == 4
    assert "model.prediction: v" in (refused.value.hint or "")
    assert not list(bare.output.glob("checkpoint-*"))


def test_a_key_that_seems_wrong_is_followed_with_a_warning(
    bare: Config, screen: Screen, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(monkeypatch, "v_prediction", told=True)
    by_key = change(bare, model={"prediction": "epsilon"}, train={"steps": 1})
    train(by_key, screen.console)
    assert "warning: model.prediction says that the model predicts epsilon" in screen.text
    metadata = read_header(bare.output / "disc.safetensors").metadata
    assert metadata["modelspec.prediction_type"] == "epsilon"


def test_another_prediction_is_a_changed_setting_and_the_same_one_is_not(
    bare: Config, screen: Screen, change: Change
) -> None:
    train(change(bare, train={"steps": 1}), screen.console)
    train(change(bare, model={"prediction": "epsilon"}, train={"steps": 2}), screen.console)
    assert "going on from step 1" in screen.text
    other = change(bare, model={"prediction": "v"}, train={"steps": 3})
    with pytest.raises(ConfigError) as refused:
        train(other, screen.console)
    assert refused.value.problems == ("model.prediction: 'epsilon' before, 'v' now",)
    train(other, screen.console, allow_change=frozenset({"model.prediction"}))
    assert "going on from step 2" in screen.text


def test_where_parts_lie_does_not_matter_but_what_they_hold_does(
    bare: Config, screen: Screen, change: Change, tmp_path: Path, shallow: Path
) -> None:
    parts = {"vae": str(shallow), "text": str(shallow)}
    train(change(bare, model=parts, train={"steps": 1}), screen.console)
    elsewhere = shutil.copytree(shallow, tmp_path / "elsewhere")
    moved = {"vae": str(elsewhere), "text": str(elsewhere)}
    train(change(bare, model=moved, train={"steps": 2}), screen.console)
    assert "going on from step 1" in screen.text
    saved = load_config(bare.output / "config.yaml").model
    assert (saved.vae, saved.text) == (str(elsewhere), str(elsewhere))
    weights = elsewhere / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        train(change(bare, model=moved, train={"steps": 3}), screen.console)
    assert refused.value.problems == ("model: the weights of the base model",)


def test_epsilon_with_zero_terminal_snr_is_refused(
    bare: Config, screen: Screen, change: Change
) -> None:
    both = change(bare, model={"prediction": "epsilon", "zero_terminal_snr": True})
    with pytest.raises(ConfigError, match=r"cannot have zero-terminal SNR"):
        train(both, screen.console, dry_run=True)

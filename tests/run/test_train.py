import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eri.adapters import load_adapter
from eri.config import Config, load_config
from eri.errors import ConfigError, DataError, ModelError, NonFiniteError, OccupiedError, Stopped
from eri.files import lock
from eri.formats.header import read_header
from eri.formats.tensors import load_tensors
from eri.models import load_unet
from eri.run.base import BaseFacts
from eri.run.preview import Previews
from eri.run.stop import StopSignals
from eri.run.train import train
from tests.run.conftest import Screen, stop_after

Change = Callable[..., Config]


def digest(run: Path) -> dict[str, bytes]:
    """The bytes of every number that the newest checkpoint of a run holds."""
    newest = max(run.glob("checkpoint-*"))
    tensors = {
        name: tensor.numpy().tobytes()
        for file in ("adapter.safetensors", "optimizer.safetensors")
        for name, tensor in load_tensors(newest / file).items()
    }
    return tensors | {"state": (newest / "state.json").read_bytes()}


def steps_in_log(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]


def stop_in_previews(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the run believe that it got a SIGTERM while it drew the previews of a step."""
    right = Previews.draw

    def draw(self: Previews, at: int, stop: StopSignals) -> list:
        if at == step:
            stop.number = 15
        return right(self, at, stop)

    monkeypatch.setattr(Previews, "draw", draw)


def test_the_files_of_a_run_are_those_of_the_contract(finished: Path) -> None:
    files = {
        path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()
    }
    assert {
        "disc.safetensors",
        "adapters/disc-000002.safetensors",
        "adapters/disc-000004.safetensors",
        "config.yaml",
        "log.jsonl",
        "samples/000000-1.png",
        "samples/000004-1.png",
        "samples/before-after.png",
        "checkpoint-000004/manifest.json",
    } <= files
    assert [path.name for path in finished.glob("*.safetensors")] == ["disc.safetensors"]
    assert not [name for name in files if "staging" in name or name.endswith(".tmp")]


def test_the_finished_adapter_is_whole_and_says_what_it_is(finished: Path, sd15: Path) -> None:
    adapter = load_adapter(load_unet(sd15), finished / "disc.safetensors")
    assert len(adapter.layers) == 192
    assert all(layer.lora_b.weight.any() for layer in adapter.layers.values())
    tensors = load_tensors(finished / "disc.safetensors")
    assert {t.dtype for n, t in tensors.items() if "lora_" in n.rpartition(".lora_")[1]} == {
        torch.float16
    }


def test_what_it_was_trained_on_is_told_only_when_it_is_asked_for(
    bare: Config, screen: Screen, change: Change, finished: Path
) -> None:
    assert b"red disc" not in (finished / "disc.safetensors").read_bytes()
    assert str(finished.parent).encode() not in (finished / "disc.safetensors").read_bytes()
    full = change(bare, save={"metadata": "full"}, train={"steps": 1})
    train(full, screen.console)
    metadata = read_header(bare.output / "disc.safetensors").metadata
    folder = str(bare.data[0].path)
    assert json.loads(metadata["ss_tag_frequency"])[folder]["a red disc 3"] == 1
    assert json.loads(metadata["ss_dataset_dirs"])[folder]["img_count"] == 5


def test_the_log_has_a_line_for_each_step_with_what_was_seen(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    seen = [Path(file).name for line in lines[:3] for file in line["files"]]
    assert sorted(seen) == [f"{n}.png" for n in range(5)]  # one epoch: each image once
    assert {"loss", "lr", "images_per_second", "grad_norm"} <= lines[0].keys()


def test_the_same_command_on_a_finished_run_trains_nothing(bare: Config, screen: Screen) -> None:
    train(bare, screen.console)
    before = digest(bare.output)
    times = {p: p.stat().st_mtime_ns for p in bare.output.rglob("*") if p.name != "run.lock"}
    train(bare, screen.console)
    assert "this run is finished: 4 steps are done; nothing to train" in screen.text
    assert "done     4 steps of these; 0 are left" in screen.text
    assert digest(bare.output) == before
    assert {p: p.stat().st_mtime_ns for p in times} == times
    fewer = bare.model_copy(update={"train": bare.train.model_copy(update={"steps": 2})})
    train(fewer, screen.console)
    assert "4 steps are done and train.steps asks for 2; nothing to train" in screen.text
    assert "hint: train.steps above 4 trains on" in screen.text


@pytest.mark.parametrize("cut", [1, 3])
def test_a_stopped_run_goes_on_bit_by_bit(
    bare: Config, screen: Screen, change: Change, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    straight = change(bare, output=bare.output.with_name("straight"))
    train(straight, screen.console)
    with monkeypatch.context() as patch:
        stop_after(patch, cut)
        with pytest.raises(Stopped) as stopped:
            train(bare, screen.console)
    assert stopped.value.exit_code == 143
    assert steps_in_log(bare.output) == list(range(1, cut + 1))
    assert not (bare.output / "disc.safetensors").exists()
    train(bare, screen.console)
    assert f"going on from step {cut}" in screen.text
    assert steps_in_log(bare.output) == [1, 2, 3, 4]
    assert digest(bare.output) == digest(straight.output)


@pytest.mark.parametrize("step", [0, 1, 4])
def test_stopped_while_drawing_nothing_is_lost(
    bare: Config, screen: Screen, change: Change, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    config = change(bare, sample={"every": 1}, save={"every": 100})
    with monkeypatch.context() as patch:
        stop_in_previews(patch, step)
        with pytest.raises(Stopped):
            train(config, screen.console)
    assert f"stopped at step {step} of 4" in screen.text
    assert not (config.output / "disc.safetensors").exists()
    train(config, screen.console)
    assert steps_in_log(config.output) == [1, 2, 3, 4]
    assert (config.output / "disc.safetensors").is_file()
    assert (config.output / "samples" / "before-after.png").is_file()


def test_an_adapter_of_fewer_steps_is_not_taken_for_the_finished_one(
    bare: Config, screen: Screen, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(bare, screen.console)
    longer = change(bare, train={"steps": 6}, sample={"every": 6})
    with monkeypatch.context() as patch:
        stop_in_previews(patch, 6)
        with pytest.raises(Stopped):
            train(longer, screen.console)
    train(longer, screen.console)
    assert read_header(bare.output / "disc.safetensors").metadata["ss_steps"] == "6"


def test_without_previews_nothing_is_drawn(bare: Config, screen: Screen, change: Change) -> None:
    train(change(bare, train={"steps": 1}), screen.console)
    assert not (bare.output / "samples").exists()
    assert (bare.output / "disc.safetensors").is_file()


def test_the_config_in_the_run_means_the_same_anywhere(
    bare: Config, screen: Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bare.output.parent)
    relative = bare.model_copy(update={"output": Path("disc")})
    train(relative, screen.console)
    monkeypatch.chdir("/")
    again = load_config(bare.output / "config.yaml")
    assert again.output == bare.output
    train(again, screen.console)
    assert "this run is finished" in screen.text


def test_without_a_sound_checkpoint_nothing_is_overwritten(bare: Config, screen: Screen) -> None:
    train(bare, screen.console)
    for checkpoint in bare.output.glob("checkpoint-*"):
        (checkpoint / "state.json").write_text("{}")
    before = (bare.output / "log.jsonl").read_text()
    with pytest.raises(ModelError, match="none of the 2 checkpoints is sound"):
        train(bare, screen.console)
    assert (bare.output / "log.jsonl").read_text() == before


def test_another_seed_does_not_lead_to_the_same_adapter(
    bare: Config, screen: Screen, change: Change, finished: Path
) -> None:
    other = change(bare, train={"seed": 1})
    train(other, screen.console)
    assert digest(other.output) != digest(finished)


def test_more_steps_train_on(bare: Config, screen: Screen, change: Change) -> None:
    train(bare, screen.console)
    train(change(bare, train={"steps": 5}), screen.console)
    assert "going on from step 4" in screen.text
    assert steps_in_log(bare.output) == [1, 2, 3, 4, 5]


def test_a_changed_setting_is_refused_unless_it_is_allowed(
    bare: Config, screen: Screen, change: Change
) -> None:
    train(bare, screen.console)
    changed = change(bare, train={"lr": 2e-3, "steps": 6})
    with pytest.raises(ConfigError, match="what made this run has changed") as refused:
        train(changed, screen.console)
    assert refused.value.problems == ("train.lr: 0.001 before, 0.002 now",)
    with pytest.raises(ConfigError, match="no such setting"):
        train(changed, screen.console, allow_change=frozenset({"train.rate"}))
    falling = change(bare, train={"schedule": "cosine", "steps": 6})
    with pytest.raises(ConfigError) as refused:
        train(falling, screen.console)
    assert refused.value.problems == ("train.schedule: 'constant' before, 'cosine' now",)
    train(changed, screen.console, allow_change=frozenset({"train.lr"}))
    assert steps_in_log(bare.output)[-1] == 6


def test_a_changed_caption_is_a_changed_setting(bare: Config, screen: Screen) -> None:
    train(bare, screen.console)
    (bare.data[0].path / "0.txt").write_text("something else")
    with pytest.raises(ConfigError) as refused:
        train(bare, screen.console)
    assert refused.value.problems == ("images: the images or their captions",)


def test_restart_begins_anew_beside_the_old_run(bare: Config, screen: Screen) -> None:
    train(bare, screen.console)
    before = digest(bare.output)
    train(bare, screen.console, restart=True)
    beside = bare.output.with_name("disc-2")
    assert (beside / "disc-2.safetensors").is_file()
    assert digest(bare.output) == before


def test_a_damaged_checkpoint_is_passed_over_aloud(
    bare: Config, screen: Screen, change: Change
) -> None:
    train(bare, screen.console)
    damaged = bare.output / "checkpoint-000004" / "optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    train(change(bare, train={"steps": 5}), screen.console)
    assert "warning: checkpoint-000004 is not used" in screen.text
    assert "going on from step 2" in screen.text
    assert steps_in_log(bare.output) == [1, 2, 3, 4, 5]
    assert len(list(bare.output.glob("damaged-checkpoint-000004-*"))) == 1


def test_a_dry_run_writes_nothing(bare: Config, screen: Screen) -> None:
    train(bare, screen.console, dry_run=True)
    assert not bare.output.exists()
    assert "training 4 steps of up to 2 images" in screen.text
    assert "64x64            4" in screen.text and "64x128           1" in screen.text


def test_a_run_is_planned_without_the_models_of_transformers(bare: Config) -> None:
    """They take seconds to import, and a run whose texts are cached needs none."""
    path = str(bare.output.parent / "config.yaml")
    code = f"""if True:
        import sys
        from eri.cli import app
        app(["train", {path!r}, "--dry-run"], standalone_mode=False)
        print("transformers.tokenization_utils_base" in sys.modules)
        print("transformers.modeling_utils" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["True", "False"]


def test_a_dry_run_refuses_a_text_encoder_that_does_not_fit(
    bare: Config, change: Change, screen: Screen, tmp_path: Path
) -> None:
    model = shutil.copytree(bare.model.path, tmp_path / "model")
    file = model / "text_encoder" / "model.safetensors"
    tensors = load_tensors(file)
    name = next(name for name in tensors if name.endswith("final_layer_norm.bias"))
    save_file(tensors | {name: torch.zeros(3)}, file)
    with pytest.raises(ModelError, match="1 tensors do not fit"):
        train(change(bare, model={"path": str(model)}), screen.console, dry_run=True)


def test_a_locked_run_is_left_alone(bare: Config, screen: Screen) -> None:
    bare.output.mkdir()
    with lock(bare.output), pytest.raises(OccupiedError):
        train(bare, screen.console)


def test_nothing_is_loaded_before_images_and_model_are_known_to_be_there(
    bare: Config, screen: Screen, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were loaded")

    for part in ("load_unet", "load_vae", "load_text"):
        monkeypatch.setattr(BaseFacts, part, load)
    (bare.data[0].path / "0.txt").unlink()
    (bare.data[0].path / "1.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match="2 of 5") as refused:
        train(bare, screen.console)
    faults = [line for line in refused.value.problems if not line.startswith("note:")]
    assert len(faults) == 2
    missing = bare.model.model_copy(update={"path": "not/there/at/all"})
    with pytest.raises(ModelError, match="no such model"):  # before the images
        train(change(bare, model=missing), screen.console)


def test_a_loss_that_is_not_finite_ends_the_run_and_saves_nothing_of_it(
    bare: Config, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eri.run.objective import Objective

    right = Objective.draw

    def wrong(self: Objective, batch) -> dict[str, torch.Tensor]:
        inputs = right(self, batch)
        return inputs | {"mean": inputs["mean"] * float("nan" if batch.numbers[0] >= 5 else 1)}

    monkeypatch.setattr(Objective, "draw", wrong)
    with pytest.raises(NonFiniteError, match="step 4") as stopped:
        train(bare, screen.console)
    assert all(".png, timestep " in line for line in stopped.value.problems)  # of the step
    assert steps_in_log(bare.output) == [1, 2, 3]
    assert [path.name for path in bare.output.glob("checkpoint-*")] == ["checkpoint-000002"]
    assert not (bare.output / "disc.safetensors").exists()

from pathlib import Path

import pytest
import torch

from eri.adapters import Adapter, attach, layer_shapes
from eri.errors import ConfigError
from eri.models import UNet, load_unet
from eri.run import checkpoints
from eri.train import Step, TrainState
from tests.losses import LossOf, Rows


def build(unet: UNet) -> tuple[TrainState, Adapter]:
    adapter = attach(unet, rank=2)
    return TrainState(adapter.flatten(torch.float32)), adapter


def advance(state: TrainState) -> None:
    def far(weights, rows: torch.Tensor) -> torch.Tensor:
        return rows @ torch.stack([(w - state.step).square().sum() for w in weights.values()])

    torch.manual_seed(state.step)
    rows = torch.rand(2, len(state.flat.parameters))
    step = Step(state, LossOf(state, far), weight_decay=0.0, max_grad_norm=None)
    step([Rows(rows)], 0.1).result()
    state.step += 1


def save(run: Path, state: TrainState, adapter: Adapter) -> Path:
    return checkpoints.save(run, state, adapter, identity={"seed": 0}, metadata={})


def test_a_checkpoint_brings_everything_back(sd15: Path, tmp_path: Path) -> None:
    state, adapter = build(load_unet(sd15))
    advance(state)
    path = save(tmp_path, state, adapter)
    assert path.name == "checkpoint-000001"
    fresh_unet = load_unet(sd15)
    shapes = layer_shapes(fresh_unet)
    fresh, fresh_adapter = build(fresh_unet)
    found = checkpoints.newest(tmp_path)
    assert found is not None
    assert (found.step, found.identity) == (1, {"seed": 0})
    checkpoints.load(found, fresh, fresh_adapter, shapes)
    for one in (state, fresh):
        advance(one)
    assert fresh.step == 2
    assert fresh.numbers() == state.numbers()
    assert torch.equal(fresh.flat.master, state.flat.master)


def test_saving_the_same_step_again_keeps_the_first(sd15: Path, tmp_path: Path) -> None:
    state, adapter = build(load_unet(sd15))
    before = (save(tmp_path, state, adapter) / "manifest.json").stat().st_mtime_ns
    assert (save(tmp_path, state, adapter) / "manifest.json").stat().st_mtime_ns == before


def test_the_newest_that_verifies_is_used_and_pruning_keeps_the_newest(
    sd15: Path, tmp_path: Path
) -> None:
    state, adapter = build(load_unet(sd15))
    for _ in range(3):
        advance(state)
        save(tmp_path, state, adapter)
    (tmp_path / "checkpoint-000003" / "state.json").write_text("{}")
    (tmp_path / "checkpoint-old").mkdir()  # not ours
    said: list[str] = []
    found = checkpoints.newest(tmp_path, said.append)
    assert found is not None and found.step == 2
    assert len(said) == 1 and "checkpoint-000003 is not used" in said[0]
    checkpoints.prune(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-000003", "checkpoint-old"]


def test_a_million_steps_are_still_in_order(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        (tmp_path / f"checkpoint-{step:06}").mkdir()
    checkpoints.prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1000000"]


def test_changes_are_listed_and_may_be_allowed_one_by_one(tmp_path: Path) -> None:
    before = {"train.lr": 0.1, "train.seed": 0, "gone": 1}
    checkpoint = checkpoints.Checkpoint(tmp_path / "checkpoint-000001", 1, {}, before)
    now = {"train.lr": 0.2, "train.seed": 0}
    with pytest.raises(ConfigError) as refused:
        checkpoints.refuse_changes(checkpoint, now, frozenset())
    assert refused.value.hint is not None
    assert "--allow-change gone --allow-change train.lr" in refused.value.hint
    assert refused.value.problems == ("gone: 1 before, None now", "train.lr: 0.1 before, 0.2 now")
    checkpoints.refuse_changes(checkpoint, now, frozenset({"gone", "train.lr"}))
    checkpoints.refuse_changes(checkpoint, before, frozenset())

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from eri.adapters import Adapter, attach, layer_shapes
from eri.errors import ConfigError, DiskError, ModelError, NonFiniteError
from eri.files import sweep_staging
from eri.layers.adamw import Control
from eri.models import UNet, load_unet
from eri.run import checkpoints
from eri.train import Step, TrainState
from tests.losses import LossOf, Rows


def build(unet: UNet) -> tuple[TrainState, Adapter]:
    adapter = attach(unet, rank=2)
    return TrainState(adapter.flatten()), adapter


def advance(state: TrainState) -> None:
    def far(weights, rows: torch.Tensor) -> torch.Tensor:
        return rows @ torch.stack([(w - state.step).square().sum() for w in weights.values()])

    torch.manual_seed(state.step)
    rows = torch.rand(2, len(state.flat.parameters))
    step = Step(state, LossOf(state, far), weight_decay=0.0, max_grad_norm=None)
    step([Rows(rows)], 0.1).result()
    state.step += 1


def save(run: Path, state: TrainState, adapter: Adapter) -> Path:
    checkpoints.save(
        run, state, adapter, identity={"seed": 0}, metadata={}, made_with={"threads": 1}
    )
    return run / f"checkpoint-{state.step:06}"


def test_a_checkpoint_brings_everything_back(shallow: Path, tmp_path: Path) -> None:
    state, adapter = build(load_unet(shallow))
    advance(state)
    path = save(tmp_path, state, adapter)
    assert path.name == "checkpoint-000001"
    fresh_unet = load_unet(shallow)
    shapes = layer_shapes(fresh_unet)
    fresh, fresh_adapter = build(fresh_unet)
    found = checkpoints.newest(tmp_path)
    assert found is not None
    assert (found.step, found.identity, found.made_with) == (1, {"seed": 0}, {"threads": 1})
    checkpoints.load(found, fresh, fresh_adapter, shapes)
    for one in (state, fresh):
        advance(one)
    assert fresh.step == 2
    assert fresh.numbers() == state.numbers()
    assert torch.equal(fresh.flat.master, state.flat.master)


def test_saving_the_same_step_again_keeps_the_first(shallow: Path, tmp_path: Path) -> None:
    state, adapter = build(load_unet(shallow))
    before = (save(tmp_path, state, adapter) / "manifest.json").stat().st_mtime_ns
    assert (save(tmp_path, state, adapter) / "manifest.json").stat().st_mtime_ns == before


def test_the_newest_that_verifies_is_used_and_pruning_keeps_the_newest(
    shallow: Path, tmp_path: Path
) -> None:
    state, adapter = build(load_unet(shallow))
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


@pytest.mark.parametrize("where", ["moments", "scale", "weights"])
def test_what_is_not_finite_is_neither_saved_nor_taken(
    shallow: Path, tmp_path: Path, where: str
) -> None:
    state, adapter = build(load_unet(shallow))
    good = save(tmp_path, state, adapter)
    state.step = 1
    hit = {
        "moments": state.flat.exp_avg_sq,
        "scale": state.control[Control.SCALE :],
        "weights": state.flat.master,
    }
    hit[where][0] = float("nan")
    with pytest.raises(NonFiniteError):
        save(tmp_path, state, adapter)
    assert list(tmp_path.iterdir()) == [good]
    if where != "weights":
        numbers, tensors = state.numbers(), state.optimizer_tensors()
        with pytest.raises(ModelError, match=r"not finite|scale is nan"):
            build(load_unet(shallow))[0].load(tensors, numbers)


def test_there_must_be_room_for_the_state_and_its_adapter(
    shallow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, adapter = build(load_unet(shallow))
    needed = checkpoints.space_needed(state.flat.master.numel(), saves=1, keep=1)
    for free, fits in ((needed - 1, False), (needed, True)):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr("shutil.disk_usage", lambda path, usage=usage: usage)
        if not fits:
            with pytest.raises(DiskError, match="are needed and"):
                save(tmp_path, state, adapter)
            assert list(tmp_path.iterdir()) == []
    path = save(tmp_path, state, adapter)
    written = sum(file.stat().st_size for file in path.iterdir())
    adapter_size = state.flat.master.numel() * checkpoints.BYTES_OF_AN_ADAPTER
    assert written + adapter_size <= needed <= written + adapter_size + 600_000


def test_each_save_leaves_an_adapter_and_the_newest_states_stay() -> None:
    one = checkpoints.space_needed(10**6, saves=1, keep=3)
    assert 14e6 <= one <= 15e6
    assert 4 * 12e6 + 50 * 2e6 <= checkpoints.space_needed(10**6, saves=50, keep=3) <= 180e6


def test_a_crash_while_pruning_leaves_no_torn_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step:06}").mkdir()
        (tmp_path / f"checkpoint-{step:06}" / "state.json").touch()

    def torn(path: Path) -> None:
        (path / "state.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.rmtree", torn)
        checkpoints.prune(tmp_path, 1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-000002"]
    sweep_staging(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000002"]


def test_another_version_is_noted_and_refused_where_every_bit_counts(tmp_path: Path) -> None:
    before = {"torch": "2.12", "threads": 2, "python": "3.11.1"}
    path = tmp_path / "checkpoint-000001"
    checkpoint = checkpoints.Checkpoint(path, 1, {}, {"train.lr": 0.1}, before)
    now = {"torch": "2.13", "threads": 2, "python": "3.12.0"}

    def changes(*allowed: str, exact: bool) -> list[str]:
        return checkpoints.refuse_changes(
            checkpoint, {"train.lr": 0.1}, frozenset(allowed), made_with=now, exact=exact
        )

    noted = ["torch: '2.12' before, '2.13' now"]
    assert changes(exact=False) == noted
    assert changes("torch", exact=True) == noted
    with pytest.raises(ConfigError) as refused:
        changes(exact=True)
    assert refused.value.problems == tuple(noted)


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

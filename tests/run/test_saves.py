from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eri.adapters import Adapter, attach, layer_shapes
from eri.errors import DiskError, NonFiniteError
from eri.formats.adapter_file import read_adapter
from eri.models import load_unet
from eri.run import checkpoints
from eri.run.adapter_files import is_finished
from eri.run.saves import Saves
from eri.train import TrainState

METADATA = {"ss_steps": "4", "modelspec.implementation_version": "eri/test"}


@pytest.fixture
def trained(shallow: Path) -> tuple[TrainState, Adapter]:
    adapter = attach(load_unet(shallow), rank=2)
    state = TrainState(adapter.flatten())
    state.step = 4
    return state, adapter


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def saves(shallow: Path, tmp_path: Path, said: list[str]) -> Saves:
    layers = layer_shapes(load_unet(shallow))
    folder = tmp_path / "disc"
    folder.mkdir()
    return Saves(folder=folder, keep=2, layers=layers, made_with={}, say=said.append)


def save(saves: Saves, trained: tuple[TrainState, Adapter]) -> None:
    saves.save(*trained, identity={}, metadata=METADATA)


def first(saves: Saves, file: str) -> torch.Tensor:
    return next(iter(read_adapter(saves.folder / file, saves.layers).pairs.values())).down


STEP_4 = "adapters/disc-000004.safetensors"


def test_a_save_is_told_of_once_it_is_there(
    saves: Saves, trained: tuple[TrainState, Adapter], said: list[str]
) -> None:
    there = []
    telling = replace(
        saves, say=lambda text: there.append((text, checkpoints.newest(saves.folder)))
    )
    save(telling, trained)
    save(telling, trained)
    ((text, checkpoint),) = there
    assert text == "saved    checkpoint-000004"
    assert checkpoint is not None and checkpoint.step == 4
    before = (saves.folder / STEP_4).stat()
    saves.keep_adapter(*trained, METADATA)
    assert (saves.folder / STEP_4).stat() == before


def test_an_adapter_of_the_same_step_that_went_another_way_is_replaced(
    saves: Saves, trained: tuple[TrainState, Adapter]
) -> None:
    state, adapter = trained
    saves.write(adapter, saves.folder / STEP_4, METADATA)
    state.flat.master.mul_(2).add_(0.5)
    save(saves, trained)
    assert torch.equal(
        first(saves, STEP_4), first(saves, "checkpoint-000004/adapter.safetensors").half()
    )


def test_an_adapter_that_a_kill_left_out_is_written_when_the_run_goes_on(
    saves: Saves, trained: tuple[TrainState, Adapter]
) -> None:
    save(saves, trained)
    before = (saves.folder / STEP_4).read_bytes()
    for torn in (b"", before[:-1]):
        (saves.folder / STEP_4).write_bytes(torn)
        saves.keep_adapter(*trained, METADATA)
        assert (saves.folder / STEP_4).read_bytes() == before


def test_what_float16_cannot_hold_is_saved_all_the_same(
    saves: Saves, trained: tuple[TrainState, Adapter]
) -> None:
    trained[0].flat.master[0] = 70_000.0
    with pytest.raises(NonFiniteError):
        save(saves, trained)
    found = checkpoints.newest(saves.folder)
    assert found is not None and found.step == 4
    assert not (saves.folder / STEP_4).exists()


def test_a_run_goes_on_from_what_float16_cannot_hold(
    saves: Saves, trained: tuple[TrainState, Adapter], said: list[str]
) -> None:
    trained[0].flat.master[0] = 70_000.0
    saves.make_up(*trained, METADATA)
    warning, *tensors = said[0].splitlines()
    assert warning.startswith("warning: step 4 has no adapter of its own: ")
    assert len(tensors) == 1 and "lora_unet_" in tensors[0]
    assert not (saves.folder / STEP_4).exists()
    trained[0].flat.master[0] = 1.0
    saves.make_up(*trained, METADATA)
    assert (saves.folder / STEP_4).exists() and len(said) == 1


def test_a_run_is_finished_by_an_adapter_of_its_own_numbers(
    saves: Saves, trained: tuple[TrainState, Adapter]
) -> None:
    state, adapter = trained
    save(saves, trained)
    finished = saves.folder / "disc.safetensors"
    checkpoint = checkpoints.newest(saves.folder)
    assert not is_finished(saves.folder, checkpoint, 4)
    saves.write(adapter, finished, METADATA)
    assert is_finished(saves.folder, checkpoint, 4)
    assert not is_finished(saves.folder, checkpoint, 5)
    state.flat.master.add_(0.5)
    saves.write(adapter, finished, METADATA)
    assert not is_finished(saves.folder, checkpoint, 4)


def test_the_room_for_all_that_is_to_come_is_asked_for(
    saves: Saves, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    with pytest.raises(DiskError):
        saves.require_space(10**15, steps=9, every=4)
    monkeypatch.setattr("eri.run.saves.require_space", lambda folder, size: asked.append(size))
    saves.require_space(10**6, steps=9, every=4)
    assert asked == [checkpoints.space_needed(10**6, saves=4, keep=2)]


def test_numbers_too_small_for_an_adapters_type_are_told_and_kept_by_the_state(
    saves: Saves, trained: tuple[TrainState, Adapter], said: list[str]
) -> None:
    trained[0].flat.master.fill_(1e-9)
    save(saves, trained)
    warning = (
        "warning: 100.0 % of its numbers became 0; eri export-lora --dtype fp32 keeps them "
        "(disc-000004.safetensors)"
    )
    assert said == ["saved    checkpoint-000004", warning]
    assert not first(saves, STEP_4).any()
    assert first(saves, "checkpoint-000004/adapter.safetensors").all()

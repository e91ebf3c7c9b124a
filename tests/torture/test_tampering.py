"""R1: a checkpoint whose files are not its own is refused with a reason, and nothing is written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eri.adapters import Adapter
from eri.errors import ModelError
from eri.files import sha256
from eri.files.commit import commit_folder
from eri.formats.tensors import load_tensors, save_tensors
from eri.layers import LoRALinear
from eri.run import checkpoints
from eri.train import TrainState
from tests.torture.invariants import assert_message
from tests.torture.sessions import ForkServer
from tests.torture.victims import layers, small_state
from tests.torture.workload import Workload

ADAPTER, OPTIMIZER, STATE = "adapter.safetensors", "optimizer.safetensors", "state.json"
"""The files of a checkpoint."""


def seal(folder: Path) -> None:
    """Give a checkpoint a manifest that goes with its files, as somebody with a plan would."""
    identity = json.loads((folder / "manifest.json").read_text())["identity"]
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    del files["manifest.json"]
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    with commit_folder(folder, identity=identity) as staging:
        for name, content in files.items():
            (staging / name).write_bytes(content)


def save_as(folder: Path, state: TrainState, adapter: Adapter) -> Path:
    folder.mkdir()
    state.step = 2
    checkpoints.save(folder, state, adapter, identity={}, metadata={})
    return folder / "checkpoint-000002"


def other_rank(tmp_path: Path) -> Path:
    """A checkpoint of the same modules with another rank."""
    _, adapter = small_state()
    wider = {
        name: LoRALinear(*reversed(layers()[name]), layer.rank + 1)
        for name, layer in adapter.layers.items()
    }
    adapter = Adapter(torch.nn.Module(), wider)
    return save_as(tmp_path / "wider", TrainState(adapter.flatten()), adapter)


def other_targets(tmp_path: Path) -> Path:
    """A checkpoint of other modules with the same rank."""
    _, adapter = small_state()
    moved = {name.replace("to_q", "to_k"): layer for name, layer in adapter.layers.items()}
    adapter = Adapter(torch.nn.Module(), moved)
    return save_as(tmp_path / "moved", TrainState(adapter.flatten()), adapter)


def take(name: str, make: Callable[[Path], Path]) -> Callable[[Path], None]:
    """Swap a file for that of another run."""

    def swap(folder: Path) -> None:
        (folder / name).write_bytes((make(folder.parent.parent) / name).read_bytes())

    return swap


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def number(key: str, value: object) -> Callable[[Path], None]:
    """Change a number of the state."""

    def change(folder: Path) -> None:
        numbers = json.loads((folder / STATE).read_text())
        numbers = {k: v for k, v in (numbers | {key: value}).items() if v is not None}
        (folder / STATE).write_text(json.dumps(numbers))

    return change


def spoil(name: str, value: float) -> Callable[[Path], None]:
    """Put a number that is not finite into the first tensor of a file."""

    def change(folder: Path) -> None:
        tensors = load_tensors(folder / name)
        next(iter(tensors.values())).reshape(-1)[0] = value
        save_tensors(tensors, folder / name)

    return change


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


TAMPERED: dict[str, Callable[[Path], None]] = {
    "no adapter": lose(ADAPTER),
    "no optimizer": lose(OPTIMIZER),
    "no state": lose(STATE),
    "adapter of another rank": take(ADAPTER, other_rank),
    "adapter of other modules": take(ADAPTER, other_targets),
    "optimizer of another rank": take(OPTIMIZER, other_rank),
    "optimizer of other modules": take(OPTIMIZER, other_targets),
    "adapter that is an optimizer": lambda folder: (
        (folder / ADAPTER).write_bytes((folder / OPTIMIZER).read_bytes()) and None
    ),
    "adapter with a NaN": spoil(ADAPTER, float("nan")),
    "optimizer with a NaN": spoil(OPTIMIZER, float("nan")),
    "optimizer with an infinity": spoil(OPTIMIZER, float("inf")),
    "state of another step": number("step", 99),
    "state without its step": number("step", None),
    "state whose step is a text": number("step", "2"),
    "state without its updates": number("updates", None),
    "state whose updates are a text": number("updates", "many"),
    "state with a NaN": number("updates", float("nan")),
    "state that is a list": text(STATE, "[]"),
    "state that is no JSON": text(STATE, "step: 2"),
    "state that nests without end": text(STATE, "[" * 100_000),
}


def everything(run: Path) -> dict[str, str]:
    return {
        path.relative_to(run).as_posix(): sha256(path) for path in run.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("tampered", TAMPERED)
def test_a_checkpoint_with_a_file_that_is_not_its_own_is_refused(
    tmp_path: Path, tampered: str
) -> None:
    state, adapter = small_state()
    folder = save_as(tmp_path / "run", state, adapter)
    TAMPERED[tampered](folder)
    seal(folder)
    before = everything(tmp_path / "run")
    fresh, fresh_adapter = small_state()
    with pytest.raises(ModelError):
        checkpoints.load(checkpoints.read(folder), fresh, fresh_adapter, layers())
    assert everything(tmp_path / "run") == before


def test_one_that_is_sealed_again_untouched_is_used(tmp_path: Path) -> None:
    state, adapter = small_state()
    state.flat.exp_avg.fill_(3)
    folder = save_as(tmp_path / "run", state, adapter)
    seal(folder)
    fresh, fresh_adapter = small_state()
    checkpoints.load(checkpoints.read(folder), fresh, fresh_adapter, layers())
    assert fresh.step == 2 and torch.equal(fresh.flat.exp_avg, state.flat.exp_avg)


def test_the_command_ends_with_4_and_leaves_the_run_as_it_was(
    workload: Workload, straight: Workload, server: ForkServer
) -> None:
    workload.copy_run(straight)
    step = workload.take_back()
    folder = workload.run / f"checkpoint-{step:06}"
    spoil(OPTIMIZER, float("nan"))(folder)
    seal(folder)
    before = everything(workload.run)
    ended = server.start("train", workload.config, folder=workload.folder / "said").wait()
    assert ended.code == 4, ended.err
    assert_message(ended.err)
    after = everything(workload.run)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed <= {"run.lock", "config.yaml"}, changed

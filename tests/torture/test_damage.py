"""T1: a damaged file is refused by name, and a run goes on from the checkpoint before."""

from pathlib import Path

import pytest
import torch

from eri.errors import ModelError
from eri.formats.adapter_file import Dialect, read_adapter, write_adapter
from eri.run import checkpoints
from eri.run.adapter_files import layers_in
from tests.torture.damage import DAMAGE
from tests.torture.invariants import assert_invariants, assert_message
from tests.torture.sessions import ForkServer
from tests.torture.victims import layers, small_state
from tests.torture.workload import Workload, digest

METADATA = {"modelspec.implementation_version": "eri/0.0"}
FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "peft"])
def test_an_adapter_alone_is_refused_however_it_is_damaged(
    tmp_path: Path, dialect: Dialect
) -> None:
    state, adapter = small_state()
    state.flat.master.copy_(torch.randn_like(state.flat.master))
    path = tmp_path / "lora"
    write_adapter(adapter.pairs(), path, dialect=dialect, metadata=METADATA, modules=layers())
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    whole = file.read_bytes()
    for what, damaged in DAMAGE.items():
        assert damaged(whole) != whole, what
        file.write_bytes(damaged(whole))
        with pytest.raises(ModelError) as refused:
            read_adapter(path, layers())
        assert str(file) in str(refused.value), what
    file.write_bytes(whole)
    assert read_adapter(path, layers()).pairs.keys() == adapter.pairs().keys()


def test_numbers_that_another_program_changed_are_its_own_matter(tmp_path: Path) -> None:
    """Its hash may be of other numbers; only what eri wrote is compared."""
    _, adapter = small_state()
    path = tmp_path / "a.safetensors"
    for writer, refused in (("eri/0.0", True), ("sd-scripts", False)):
        metadata = {"modelspec.implementation_version": writer}
        write_adapter(adapter.pairs(), path, dialect="kohya", metadata=metadata)
        path.write_bytes(DAMAGE["one bit of the data"](path.read_bytes()))
        if refused:
            with pytest.raises(ModelError, match="not what was written"):
                read_adapter(path, layers())
        else:
            assert read_adapter(path, layers()).pairs


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_with_a_damaged_file_is_passed_over(tmp_path: Path, name: str) -> None:
    state, adapter = small_state()
    for state.step in (1, 2):
        for numbers in (state.flat.master, state.flat.exp_avg, state.flat.exp_avg_sq):
            numbers.copy_(torch.randn_like(numbers))
        checkpoints.save(tmp_path, state, adapter, identity={"train.lr": "1e-3"}, metadata={})
    path = tmp_path / "checkpoint-000002" / name
    whole = path.read_bytes()
    for what, damaged in DAMAGE.items():
        path.write_bytes(damaged(whole))
        said: list[str] = []
        found = checkpoints.newest(tmp_path, said.append)
        assert found is not None and found.step == 1, what
        assert len(said) == 1 and "checkpoint-000002 is not used" in said[0], what
    path.unlink()
    found = checkpoints.newest(tmp_path)
    assert found is not None and found.step == 1
    path.write_bytes(whole)
    found = checkpoints.newest(tmp_path)
    assert found is not None and found.step == 2


def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    """One that were changed could make a run go on with other settings, unseen."""
    state, adapter = small_state()
    checkpoints.save(tmp_path, state, adapter, identity={"train.lr": 0.001}, metadata={})
    path = tmp_path / "checkpoint-000000" / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace("0.001", "0.003"))
    with pytest.raises(ModelError, match="manifest cannot be read"):
        checkpoints.read(path.parent)
    path.write_text(text)
    assert checkpoints.read(path.parent).identity == {"train.lr": 0.001}


def test_a_run_goes_on_from_the_checkpoint_before_and_says_so(
    workload: Workload, straight: Workload, server: ForkServer
) -> None:
    workload.copy_run(straight)
    step = workload.take_back()
    path = workload.run / f"checkpoint-{step:06}" / "optimizer.safetensors"
    path.write_bytes(DAMAGE["one bit of the data"](path.read_bytes()))
    ended = server.start("train", workload.config, folder=workload.folder / "said").wait()
    assert ended.code == 0, ended.err
    assert f"warning: checkpoint-{step:06} is not used" in ended.out
    assert "optimizer.safetensors" in ended.out
    assert f"going on from step {step - 4}" in ended.out
    assert_invariants(workload.run, ended)
    assert digest(workload.run) == digest(straight.run)


def test_a_damaged_adapter_ends_inspect_and_export_with_4(
    tmp_path: Path, straight: Workload, server: ForkServer
) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(DAMAGE["zeros at the end"](straight.adapter.read_bytes()))
    output = tmp_path / "out.safetensors"
    for number, arguments in enumerate((["inspect", path], ["export-lora", path, "-o", output])):
        ended = server.start(*arguments, folder=tmp_path / f"said-{number}").wait()
        assert ended.code == 4, ended.out + ended.err
        assert_message(ended.err)
        assert "lora.safetensors" in ended.err
    assert not output.exists()


def test_an_adapter_of_a_step_is_that_of_the_run_as_it_went_on(
    workload: Workload, straight: Workload, server: ForkServer
) -> None:
    """Not that of an earlier try, which went another way from an older checkpoint."""
    workload.copy_run(straight)
    step = workload.take_back()
    before = workload.run / "adapters" / f"disc-{step:06}.safetensors"
    damaged = workload.run / f"checkpoint-{step:06}" / "adapter.safetensors"
    old = before.read_bytes()
    damaged.write_bytes(b"")
    ended = server.start(
        "train",
        workload.config,
        "--set",
        "train.lr=2e-3",
        "--allow-change",
        "train.lr",
        folder=workload.folder / "said",
    ).wait()
    assert ended.code == 0, ended.err
    now = read_adapter(before, shapes := layers_in(workload.adapter)).pairs
    saved = read_adapter(workload.run / f"checkpoint-{step:06}" / "adapter.safetensors", shapes)
    assert before.read_bytes() != old
    for name, pair in saved.pairs.items():
        assert torch.equal(now[name].up, pair.up.half())

import shutil
from pathlib import Path

import pytest
import torch

from eri.adapters import attach, layer_shapes
from eri.errors import ModelError
from eri.formats import adapter_file
from eri.formats.adapter_file import LoRAPair, read_adapter
from eri.models import load_unet
from eri.models.spec import SD15
from eri.run import adapter_files
from eri.run.adapter_files import find_adapter, layers_in, shapes_of, write_verified


def test_the_finished_adapter_of_a_run_else_that_of_its_newest_checkpoint(
    finished: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "disc")
    assert find_adapter(run) == run / "disc.safetensors"
    (run / "disc.safetensors").unlink()
    assert find_adapter(run) == run / "checkpoint-000004" / "adapter.safetensors"
    assert find_adapter(run / "checkpoint-000002").parent.name == "checkpoint-000002"
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(ModelError, match="saved no adapter yet"):
        find_adapter(run)
    with pytest.raises(ModelError, match="no such file"):
        find_adapter(tmp_path / "absent")


def test_the_layers_of_a_spec_are_those_of_the_net(sd15: Path) -> None:
    unet = load_unet(sd15)
    assert shapes_of(unet.spec) == layer_shapes(unet)
    attentions = [name for name in layer_shapes(unet) if ".attention." in name]
    assert [name for name in shapes_of(SD15) if ".attention." in name] == attentions


def test_the_layers_of_an_adapter_are_known_without_its_model(finished: Path, sd15: Path) -> None:
    found = layers_in(finished / "disc.safetensors")
    everything = layer_shapes(load_unet(sd15))
    assert found.keys() == shapes_of(SD15).keys()
    adapted = read_adapter(finished / "disc.safetensors", everything).pairs
    assert len(adapted) == 192
    assert all(found[name] == everything[name] for name in adapted)


def test_what_does_not_read_back_as_it_was_written_is_refused(
    sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = load_unet(sd15)
    layers = layer_shapes(unet)
    pairs = attach(unet, rank=1).pairs()

    def write(path: Path) -> None:
        write_verified(
            pairs, path, dialect="kohya", dtype=torch.float16, metadata={}, layers=layers
        )

    write(tmp_path / "good.safetensors")

    def write_wrong(pairs: dict[str, LoRAPair], *args: object, **kwargs: object) -> None:
        name, pair = next(iter(pairs.items()))
        wrong = LoRAPair(down=pair.down * 1.01, up=pair.up, alpha=pair.alpha)
        adapter_file.write_adapter({**pairs, name: wrong}, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(adapter_files, "write_adapter", write_wrong)
    with pytest.raises(ModelError, match="does not read back"):
        write(tmp_path / "bad.safetensors")

import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eri.adapters import layer_shapes
from eri.errors import ModelError
from eri.formats.adapter_file import Dialect, LoRAPair, read_adapter, write_adapter
from eri.formats.header import read_header
from eri.formats.tensors import save_tensors
from eri.formats.unet_config import unet_config
from eri.models import load_unet
from eri.models.spec import SD15, SD21, SDXL, build_spec
from eri.models.unet import UNetSpec
from eri.run import adapter_files
from eri.run.adapter_files import find_adapter, layers_in, shapes_of, write_verified
from tests.pairs import random_pair

Layers = dict[str, tuple[int, ...]]
PROJ = r"attention\.proj_(in|out)$"
FF_AND_PROJ = rf"\.ff\.|{PROJ}"  # whose widths are the same in SD1 and SD2


def pairs_for(layers: Layers) -> dict[str, LoRAPair]:
    """A pair of rank 1 for each of these layers."""
    torch.manual_seed(0)
    return {name: random_pair(shape, rank=1, alpha=1.0) for name, shape in layers.items()}


def some(layers: Mapping[str, tuple[int, ...]], pattern: str) -> Layers:
    """The layers with a name that the pattern is found in."""
    return {name: shape for name, shape in layers.items() if re.search(pattern, name)}


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
    (tmp_path / "photos").mkdir()
    with pytest.raises(ModelError, match="no adapter in this folder"):
        find_adapter(tmp_path / "photos")


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


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_an_adapter_of_every_family_is_read_without_its_model(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, dialect: Dialect
) -> None:
    layers = shapes_of(build_spec(unet_config(request.getfixturevalue(family) / "unet")))
    pairs, path = pairs_for(some(layers, r"\.attention\.|^conv_in|\.upsample")), tmp_path / "a"
    write_adapter(pairs, path, dialect=dialect, dtype=torch.float32, metadata={}, modules=layers)
    found = read_adapter(path, layers_in(path)).pairs
    assert found.keys() == pairs.keys()
    for name, pair in pairs.items():
        assert torch.equal(found[name].down, pair.down)
        assert torch.equal(found[name].up, pair.up)


@pytest.mark.parametrize(
    ("net", "adapted"),
    [
        (SD15, "attention"),
        (SD21, "attention"),
        (SDXL, "attention"),
        (SDXL, r"up\.0\.layers\.[01]\.attention"),  # a style and a content, as B-LoRA has them
        (SD21, r"mid\.layers\.0\.attention"),  # these two have names that SD1.5 has too
        (SDXL, r"(down|up)\.1\.layers\.0\.attention\.(proj|blocks\.0)"),
        (SD15, PROJ),
        (SD21, PROJ),
        (SD15, FF_AND_PROJ),
        (SD21, FF_AND_PROJ),
    ],
    ids=[
        "sd15",
        "sd21",
        "sdxl",
        "some blocks",
        "names of sd15",
        "more names of sd15",
        "sd15 proj",
        "sd21 proj",
        "sd15 ff+proj",
        "sd21 ff+proj",
    ],
)
@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_the_net_is_the_one_whose_names_and_shapes_it_has(
    tmp_path: Path, net: UNetSpec, adapted: str, dialect: Dialect
) -> None:
    layers = shapes_of(net)
    path = tmp_path / "a.safetensors"
    pairs = pairs_for(some(layers, adapted))
    write_adapter(pairs, path, dialect=dialect, dtype=torch.float16, metadata={}, modules=layers)
    found = layers_in(path)
    assert found.items() >= some(layers, adapted).items()
    assert found.items() <= layers.items()


def test_what_may_be_of_a_smaller_net_gets_no_counted_names(tmp_path: Path, sdxl: Path) -> None:
    """KOALA has one layer a level, and its modules are some of SDXL's: 5_1 is another one there."""
    fields = unet_config(sdxl / "unet")
    depths = {"down_depths": ((0,), (2,), (6,)), "up_depths": ((6, 6), (2, 2), (0, 0))}
    layers = shapes_of(build_spec(replace(fields, layers_per_block=1, mid_depth=6, **depths)))
    path, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    pairs = pairs_for(some(layers, r"\.attention\."))
    write_adapter(pairs, path, dialect="diffusers", dtype=torch.float16, metadata={})
    counted = {}
    for net, known in (("told", layers), ("found", layers_in(path)), ("SDXL", shapes_of(SDXL))):
        write_adapter(pairs, again, dialect="kohya", metadata={}, modules=known)
        counted[net] = any("_input_blocks_" in name for name in read_header(again).tensors)
    assert counted == {"told": False, "found": False, "SDXL": True}


def test_a_projection_that_is_a_convolution_in_the_file_alone_is_written_as_the_net_has_it(
    tmp_path: Path,
) -> None:
    """kohya's scripts can build SD2 with convolutions; diffusers refuses what they then write."""
    convolutions = {
        name: (*shape, 1, 1) if re.search(r"attention\.proj_(in|out)$", name) else shape
        for name, shape in some(shapes_of(SD21), r"mid.*attention").items()
    }
    path = tmp_path / "a.safetensors"
    write_adapter(pairs_for(convolutions), path, dialect="kohya", metadata={})
    found = read_adapter(path, layers_in(path)).pairs["mid.layers.0.attention.proj_in"]
    assert (found.down.shape, found.up.shape) == ((1, 1280), (1280, 1))


def test_an_adapter_of_another_kind_of_net_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    key = "lora_unet_input_blocks_8_1_transformer_blocks_{}_attn1_to_q.lora_{}.weight"
    for depth, problem in ((9, None), (10, "2 keys that belong to no module")):
        tensors = {key.format(depth, part): torch.ones(1, 1) for part in ("down", "up")}
        save_tensors(tensors, path)
        if problem is None:
            assert layers_in(path)
            continue
        with pytest.raises(ModelError, match=problem):
            layers_in(path)


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("alphas", [(1.0, 1.0), (0.3, 8.0)], ids=["one alpha", "two alphas"])
@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ("down", "does not read back"),
        ("up", "does not read back"),
        ("alpha", "does not read back"),
        ("the end", "bytes"),
    ],
)
def test_what_does_not_read_back_as_it_was_written_is_refused_and_deleted(
    sd15: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dialect: Dialect,
    alphas: tuple[float, float],
    broken: str,
    problem: str,
) -> None:
    layers = shapes_of(build_spec(unet_config(sd15 / "unet")))
    pairs = {
        name: replace(pair, alpha=alphas[name == "conv_in"])
        for name, pair in pairs_for(some(layers, "^conv_in|^mid")).items()
    }
    path = tmp_path / "a"

    def write() -> None:
        dtype = torch.float16
        write_verified(pairs, path, dialect=dialect, dtype=dtype, metadata={}, layers=layers)

    def write_wrong(
        pairs: dict[str, LoRAPair], path: Path, *, dialect: Dialect, **rest: Any
    ) -> None:
        write_adapter(pairs | wrong, path, dialect=dialect, **rest)
        file = path / "adapter_model.safetensors" if dialect == "peft" else path
        if broken == "the end":
            file.write_bytes(file.read_bytes()[:-1])

    name = "mid.layers.0.attention.blocks.0.attn2.to_k"
    wrong = {name: changed(pairs[name], broken)} if broken != "the end" else {}
    with monkeypatch.context() as patch:
        patch.setattr(adapter_files, "write_adapter", write_wrong)
        with pytest.raises(ModelError, match=problem):
            write()
    assert list(tmp_path.iterdir()) == []
    write()
    assert list(tmp_path.iterdir()) == [path]


def changed(pair: LoRAPair, part: str) -> LoRAPair:
    """The pair with one number that is a little different."""
    if part == "alpha":
        return replace(pair, alpha=pair.alpha * 1.01)
    matrix = getattr(pair, part).clone()
    matrix[-1, -1] *= 1.01
    return replace(pair, **{part: matrix})

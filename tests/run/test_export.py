import re
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from eri.adapters import attach, load_adapter
from eri.errors import DiskError, ModelError, NonFiniteError, OccupiedError
from eri.files import sha256
from eri.formats.adapter_file import Dialect, LoRAPair, read_adapter, write_adapter
from eri.formats.header import read_header
from eri.formats.tensors import save_tensors
from eri.formats.unet_config import UNetConfigFields, unet_config
from eri.formats.unet_names import to_diffusers
from eri.models import load_unet
from eri.models.spec import SD15, SD15_FIELDS, SD21, SD21_FIELDS, SDXL, build_spec
from eri.models.unet import UNet, UNetSpec
from eri.run.adapter_files import layers_in, shapes_of
from eri.run.export import DTYPES, export
from tests.pairs import random_pair


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_every_dialect_reads_back_as_the_same_adapter(
    finished: Path, sd15: Path, tmp_path: Path, dialect: Dialect, precision: str
) -> None:
    output = tmp_path / "out" / "adapter.safetensors"
    said = export(finished, output, dialect=dialect, precision=precision, overwrite=False)
    assert said.endswith(f"192 modules, {dialect} names, {precision}")
    exported = load_adapter(load_unet(sd15), output)
    original = load_adapter(load_unet(sd15), finished / "disc.safetensors")
    tolerance = 2**-7 if precision == "bf16" else 1e-6  # the original is fp16
    for name, layer in original.layers.items():
        difference = exported.layers[name].delta() - layer.delta()
        assert difference.norm() <= tolerance * layer.delta().norm()


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_once_around_all_dialects_changes_nothing(
    request: pytest.FixtureRequest, tmp_path: Path, family: str
) -> None:
    """The same bytes come back, though none of these files is with its base model."""
    layers = shapes_of(build_spec(unet_config(request.getfixturevalue(family) / "unet")))
    torch.manual_seed(0)
    pairs = {
        name: random_pair(shape, rank=2, alpha=3.0)
        for name, shape in layers.items()
        if ".attention." in name
    }
    paths = [tmp_path / f"{number}" for number in range(4)]
    write_adapter(pairs, paths[0], dialect="kohya", metadata={}, modules=layers)
    dialects: tuple[Dialect, ...] = ("diffusers", "peft", "kohya")
    for number, dialect in enumerate(dialects):
        export(paths[number], paths[number + 1], dialect=dialect, precision="fp16", overwrite=False)
    assert paths[0].read_bytes() == paths[3].read_bytes()
    own = "lora_unet_input_blocks_4_1" if family == "sdxl" else "lora_unet_down_blocks_1_attenti"
    assert any(name.startswith(own) for name in read_header(paths[3]).tensors)


@pytest.fixture(scope="module")
def mixed(sd15: Path) -> dict[str, LoRAPair]:
    """Ranks and alphas that differ, as LoCon with an alpha for convolutions and resizing make."""
    torch.manual_seed(0)
    settings = [(4, 4.0), (8, 2.0), (2, 1.0), (4, 0.3), (3, 6.0), (4, 4.001)]
    layers = shapes_of(build_spec(unet_config(sd15 / "unet")))
    return {
        name: LoRAPair(
            down=torch.randn(rank, *shape[1:]).half(),
            up=torch.randn(shape[0], rank, *(1 for _ in shape[2:])).half(),
            alpha=alpha,
        )
        for (name, shape), (rank, alpha) in zip(layers.items(), cycle(settings), strict=False)
    }


def update(pair: LoRAPair) -> Tensor:
    down, up = pair.down.double().flatten(1), pair.up.double().flatten(1)
    return up @ down * (pair.alpha / pair.rank)


def save_with_alphas(pairs: dict[str, LoRAPair], path: Path) -> None:
    """As kohya's scripts and LyCORIS write it: an alpha beside each pair."""
    tensors = {}
    for module, pair in pairs.items():
        name = "lora_unet_" + to_diffusers(module).replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = pair.down
        tensors[f"{name}.lora_up.weight"] = pair.up
        tensors[f"{name}.alpha"] = torch.tensor(pair.alpha)
    save_tensors(tensors, path)


@pytest.mark.parametrize("source", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("target", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_ranks_and_alphas_that_differ_are_exported(
    mixed: dict[str, LoRAPair],
    tmp_path: Path,
    source: Dialect,
    target: Dialect,
    precision: str,
) -> None:
    given, output = tmp_path / "given", tmp_path / "output"
    if source == "kohya":
        save_with_alphas(mixed, given)
    else:
        write_adapter(mixed, given, dialect=source, metadata={})
    export(given, output, dialect=target, precision=precision, overwrite=False)
    found = read_adapter(output, layers_in(output)).pairs
    assert found.keys() == mixed.keys()
    rounding = 2 * torch.finfo(DTYPES[precision]).eps
    for name, pair in mixed.items():
        expected = update(pair)
        assert (update(found[name]) - expected).norm() <= rounding * expected.norm(), name


@pytest.mark.parametrize("targets", ["proj", "ff+proj"])
@pytest.mark.parametrize("fields", [SD15_FIELDS, SD21_FIELDS], ids=["sd15", "sd21"])
@pytest.mark.parametrize("small", [False, True], ids=["whole", "narrow"])
def test_without_attention_a_projection_keeps_its_kernel_or_has_none(
    tmp_path: Path, targets: str, fields: UNetConfigFields, small: bool
) -> None:
    """diffusers refuses a matrix of SD2 that was given the 1×1 kernel of SD1."""
    if small:
        fields = replace(fields, block_channels=(320, 320, 640, 640))
    with torch.device("meta"):
        adapter = attach(UNet(build_spec(fields)), rank=1, targets=targets)
    shapes = {name: (pair.down.shape, pair.up.shape) for name, pair in adapter.pairs().items()}
    pairs = {
        name: LoRAPair(down=torch.ones(down), up=torch.ones(up), alpha=1.0)
        for name, (down, up) in shapes.items()
    }
    paths = [tmp_path / f"{number}" for number in range(4)]
    write_adapter(pairs, paths[0], dialect="peft", metadata={})
    dialects: tuple[Dialect, ...] = ("kohya", "diffusers", "kohya")
    for number, dialect in enumerate(dialects):
        export(paths[number], paths[number + 1], dialect=dialect, precision="fp16", overwrite=False)
        found = read_adapter(paths[number + 1], layers_in(paths[number + 1])).pairs
        assert {name: (p.down.shape, p.up.shape) for name, p in found.items()} == shapes


def test_a_hash_of_other_numbers_stays_behind(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    export(finished, output, dialect="diffusers", precision="bf16", overwrite=False)
    before = read_header(finished / "disc.safetensors").metadata["modelspec.hash_sha256"]
    header = read_header(output)
    metadata = header.metadata
    assert metadata["modelspec.hash_sha256"] == f"0x{sha256(output, start=header.data_start)}"
    assert metadata["modelspec.hash_sha256"] != before
    assert "sshs_model_hash" not in metadata
    assert metadata["modelspec.title"] == "disc"


def seen_by_a1111(metadata: dict[str, str]) -> str:
    """The rule by which A1111 1.10 sorts adapters and hides those of another family."""
    if not metadata:
        return "unknown"
    if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "sdxl"
    return "sd21" if metadata.get("ss_v2") == "True" else "sd15"


@pytest.mark.parametrize("source", ["diffusers", "peft"])
@pytest.mark.parametrize(
    ("net", "adapted", "family"),
    [
        (SD15, r"\.attn2\.", "sd15"),
        (SD21, r"\.attn2\.", "sd21"),
        (SDXL, r"\.attn2\.", "sdxl"),
        (SDXL, r"(down|up)\.\d\.layers\.0\.attention\..+\.to_q", "sdxl"),  # of KOALA, too
        (SD15, r"\.attention\.proj_", "sd15"),
        (SD21, r"\.attention\.proj_", "sd21"),
        (SD21, r"\.ff\.", "unknown"),  # of the same widths in SD1 and SD2
        (SDXL, r"mid\.layers\.0\.attention\.blocks\.0\.attn1\.", "unknown"),  # in all three
    ],
)
def test_uis_are_told_the_family_where_the_layers_tell_it(
    tmp_path: Path, source: Dialect, net: UNetSpec, adapted: str, family: str
) -> None:
    pairs = {
        name: random_pair(shape, rank=1, alpha=1.0)
        for name, shape in shapes_of(net).items()
        if re.search(adapted, name)
    }
    given, output, again = tmp_path / "given", tmp_path / "output", tmp_path / "again"
    write_adapter(pairs, given, dialect=source, metadata={})
    export(given, output, dialect="kohya", precision="fp16", overwrite=False)
    metadata = read_header(output).metadata
    assert seen_by_a1111(metadata) == family
    versions = {"sd15": "sd_v1", "sd21": "sd_v2", "sdxl": "sdxl_base_v1-0"}
    if family in versions:
        hashes = {"sshs_model_hash", "modelspec.hash_sha256"}
        assert metadata.keys() == {"ss_base_model_version", "ss_v2"} | hashes
        assert metadata["ss_base_model_version"] == versions[family]
        assert metadata["ss_v2"] == str(family == "sd21")
    export(output, again, dialect="diffusers", precision="fp16", overwrite=False)
    told = {key: v for key, v in read_header(again).metadata.items() if key.startswith("ss_")}
    assert told == {key: v for key, v in metadata.items() if key.startswith("ss_")}


def test_a_family_that_the_header_tells_stays(tmp_path: Path) -> None:
    given, output = tmp_path / "given", tmp_path / "output"
    pairs = {
        "mid.layers.0.attention.blocks.0.attn2.to_k": LoRAPair(
            down=torch.ones(1, 1024), up=torch.ones(1280, 1), alpha=1.0
        )
    }
    told = {"ss_base_model_version": "sd_v2_v", "ss_v2": "True", "ss_network_dim": "1"}
    write_adapter(pairs, given, dialect="diffusers", metadata=told)
    export(given, output, dialect="kohya", precision="fp16", overwrite=False)
    metadata = read_header(output).metadata
    assert {key: v for key, v in metadata.items() if key.startswith("ss_")} == told


def test_a_run_a_checkpoint_and_a_file_are_all_sources(finished: Path, tmp_path: Path) -> None:
    sources = [finished, finished / "checkpoint-000004", finished / "disc.safetensors"]
    for number, source in enumerate(sources):
        output = tmp_path / f"{number}.safetensors"
        export(source, output, dialect="kohya", precision="fp16", overwrite=False)
        assert len(read_header(output).tensors) == 3 * 192


def test_what_exists_is_kept_unless_it_may_be_replaced(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "mine.safetensors"
    output.write_text("precious")
    with pytest.raises(OccupiedError):
        export(finished, output, dialect="kohya", precision="fp16", overwrite=False)
    assert output.read_text() == "precious"
    export(finished, output, dialect="kohya", precision="fp16", overwrite=True)
    assert read_header(output).tensors


@pytest.mark.parametrize("dialect", ["kohya", "peft"])
def test_a_folder_is_never_replaced(finished: Path, tmp_path: Path, dialect: Dialect) -> None:
    output = tmp_path / "loras"
    output.mkdir()
    (output / "other.safetensors").write_text("precious")
    with pytest.raises(OccupiedError):
        export(finished, output, dialect=dialect, precision="fp16", overwrite=True)
    assert (output / "other.safetensors").read_text() == "precious"


def test_what_the_header_tells_of_the_data_stays_behind(
    finished: Path, sd15: Path, tmp_path: Path
) -> None:
    source, output = tmp_path / "told.safetensors", tmp_path / "out.safetensors"
    pairs = attach(load_unet(sd15), rank=1).pairs()
    told = {"ss_tag_frequency": "{}", "ss_dataset_dirs": "/home/jane", "ss_network_dim": "1"}
    write_adapter(pairs, source, dialect="kohya", dtype=torch.float32, metadata=told)
    export(source, output, dialect="kohya", precision="fp16", overwrite=False)
    metadata = read_header(output).metadata
    assert metadata["ss_network_dim"] == "1"
    assert b"jane" not in output.read_bytes()


def test_numbers_that_vanish_in_the_smaller_type_are_told(sd15: Path, tmp_path: Path) -> None:
    pairs = attach(load_unet(sd15), rank=1).pairs()
    small = {n: LoRAPair(down=p.down * 1e-9, up=p.up, alpha=1.0) for n, p in pairs.items()}
    source = tmp_path / "small.safetensors"
    write_adapter(small, source, dialect="kohya", dtype=torch.float32, metadata={})
    for number, (precision, told) in enumerate({"fp16": True, "fp32": False}.items()):
        output = tmp_path / f"{number}.safetensors"
        said = export(source, output, dialect="kohya", precision=precision, overwrite=False)
        assert ("became 0" in said) == told


def test_a_number_too_large_for_fp16_is_refused_and_nothing_is_written(
    sd15: Path, tmp_path: Path
) -> None:
    pairs = attach(load_unet(sd15), rank=1).pairs()
    name = next(iter(pairs))
    pairs[name] = LoRAPair(down=pairs[name].down * 1e6, up=pairs[name].up, alpha=1.0)
    source, output = tmp_path / "large.safetensors", tmp_path / "out.safetensors"
    write_adapter(pairs, source, dialect="kohya", dtype=torch.float32, metadata={})
    with pytest.raises(NonFiniteError):
        export(source, output, dialect="kohya", precision="fp16", overwrite=False)
    assert not output.exists()
    export(source, output, dialect="kohya", precision="bf16", overwrite=False)


def test_without_room_for_it_nothing_is_touched(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.safetensors"
    export(finished, output, dialect="kohya", precision="fp32", overwrite=False)
    size, before = output.stat().st_size, output.read_bytes()
    for free, fits in ((size, False), (size + 10**6, True)):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr("shutil.disk_usage", lambda path, usage=usage: usage)
        if fits:
            export(finished, output, dialect="kohya", precision="fp32", overwrite=True)
        else:
            with pytest.raises(DiskError, match="are needed"):
                export(finished, output, dialect="kohya", precision="fp32", overwrite=True)
        assert output.read_bytes() == before


@pytest.mark.parametrize("name", ["nothing", "unet"])
def test_what_is_no_adapter_is_refused(sd15: Path, tmp_path: Path, name: str) -> None:
    files = {
        "nothing": tmp_path / "nothing",
        "unet": sd15 / "unet" / "diffusion_pytorch_model.safetensors",
    }
    with pytest.raises(ModelError):
        output = tmp_path / "out.safetensors"
        export(files[name], output, dialect="kohya", precision="fp16", overwrite=False)

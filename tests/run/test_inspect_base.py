"""What `eri inspect` tells of base models and of their parts."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from eri.errors import ModelError
from eri.formats.header import read_header
from eri.models import load_unet, load_vae
from eri.run import inspect_base
from eri.run.inspect import inspect_path
from tests.compvis_names import compvis_unet_names
from tests.families import mixed, single_file
from tests.full_size import UNETS
from tests.odd_files import SSD_1B

MEASURED = "not told by the file; measured before training"
SDXL = UNETS["sdxl"]
PUBLISHED: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1.x": UNETS["sd15"],
    "Stable Diffusion 2.x": UNETS["sd15"]
    | {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "Stable Diffusion XL": SDXL,
    "Segmind SSD-1B": SDXL
    | {
        "transformer_layers_per_block": [0, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 0],
        "mid_block_type": "UNetMidBlock2D",
    },
    "Segmind Vega": SDXL
    | {
        "transformer_layers_per_block": [0, [1, 1], [2, 2]],
        "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 0],
        "mid_block_type": "UNetMidBlock2D",
    },
    "none of the published ones": SDXL | SSD_1B,
}


def test_a_folder(sdxl: Path) -> None:
    facts = inspect_path(sdxl)
    assert (facts["kind"], facts["family"], facts["layout"]) == ("base model", "sdxl", "folder")
    assert facts["parts"] == ["unet", "vae", "text_encoder", "text_encoder_2"]
    assert (facts["prediction"], facts["zero terminal SNR"]) == ("epsilon", False)
    assert facts["told by"] == "its scheduler_config.json"
    assert (facts["VAE scale"], facts["context width"], facts["resolution"]) == (0.13025, 128, 64)
    assert facts["to train with it"] == "nothing is missing"
    weights = {path.relative_to(sdxl).as_posix() for path in sdxl.rglob("*.safetensors")}
    assert facts["SHA-256"].keys() == weights
    found = facts["parameters"]
    assert found["unet"] == sum(p.numel() for p in load_unet(sdxl).parameters())
    assert found["vae"] == sum(p.numel() for p in load_vae(sdxl).model.parameters())
    assert found["all"] == sum(size for part, size in found.items() if part != "all")


def test_a_single_file(sd21: Path, tmp_path: Path) -> None:
    extra = {f"\x1bunknown.{n}": torch.ones(2) for n in range(7)}
    path = single_file(
        sd21,
        tmp_path / "m.safetensors",
        ema=True,
        loose=True,
        dtype=mixed,
        markers=["v_pred"],
        extra=extra,
        metadata={"a\x1b[1m": "b" * 900, "modelspec.title": "t"},
    )
    facts = inspect_path(path)
    assert (facts["family"], facts["names"], facts["layout"]) == ("sd21", "compvis", "single file")
    assert (facts["prediction"], facts["zero terminal SNR"]) == ("v_prediction", MEASURED)
    assert facts["told by"] == "the file's marker v_pred"
    assert facts["SHA-256"] == {"m.safetensors": hashlib.sha256(path.read_bytes()).hexdigest()}
    stored = read_header(path).tensors
    assert facts["tensors of an averaged copy (EMA)"] == sum("model_ema" in n for n in stored)
    assert facts["unused tensors"] == 7
    assert facts["first unused tensors"] == [rf"\x1bunknown.{n}" for n in range(5)]
    types = [i.dtype for name, i in stored.items() if name.startswith("model.diffusion_model.")]
    assert facts["dtype"]["unet"] == {t: types.count(t) for t in ("F16", "F32")}
    assert facts["dtype"]["vae"] == "F32"
    assert facts["metadata"]["modelspec.title"] == "t"
    assert facts["metadata"][r"a\x1b[1m"].endswith("…(+700)")


def test_what_a_plain_file_does_not_tell(sd15_real: Path, tmp_path: Path) -> None:
    facts = inspect_path(single_file(sd15_real, tmp_path / "m.safetensors"))
    assert facts["prediction"] == facts["zero terminal SNR"] == MEASURED
    assert not facts.keys() & {"told by", "unused tensors", "first unused tensors", "metadata"}


def test_long_metadata_is_cut(sd15_real: Path, tmp_path: Path) -> None:
    metadata = {f"key {n:02}": "" for n in range(40)}
    path = single_file(sd15_real, tmp_path / "m.safetensors", metadata=metadata)
    found = inspect_path(path)["metadata"]
    assert len(found) == 31 and found["…"] == "and 10 more"


def test_what_is_missing_is_told_with_what_to_do(sd15_real: Path, tmp_path: Path) -> None:
    facts = inspect_path(
        single_file(sd15_real, tmp_path / "unet.safetensors", without=["vae", "text"])
    )
    assert facts["kind"] == "U-Net" and facts["parts"] == ["unet"]
    vae, text = facts["to train with it"]
    assert vae.startswith("the model has no VAE; name one in model.vae")
    assert text.startswith("the model needs 1 text encoder and has none; ")


def test_what_a_unet_is_for(sd15_real: Path, tmp_path: Path) -> None:
    extra = {"model.diffusion_model.input_blocks.0.0.weight": torch.randn(32, 9, 3, 3)}
    facts = inspect_path(single_file(sd15_real, tmp_path / "m.safetensors", extra=extra))
    assert facts["input"] == "inpainting, 9 channels"
    assert inspect_path(sd15_real)["input"] == "latents, 4 channels"


@pytest.mark.parametrize(
    ("part", "kind", "use"),
    [("unet", "U-Net", "model:"), ("vae", "VAE", "model.vae"), ("text_encoder", "text", "text")],
)
def test_the_folder_of_a_part(sd15_real: Path, part: str, kind: str, use: str) -> None:
    facts = inspect_path(sd15_real / part)
    assert facts["kind"].startswith(kind) and facts["parts"] == [part]
    assert use in facts["to train with it"][0]
    assert len(facts["SHA-256"]) == 1


def test_parts_without_a_unet_in_one_file(sdxl: Path, tmp_path: Path) -> None:
    path = single_file(sdxl, tmp_path / "m.safetensors", without=["unet"])
    facts = inspect_path(path)
    assert facts["kind"] == "VAE and text encoder"
    assert facts["VAE scale"] == "not told by the file; 0.18215 in SD1.x and SD2.x, 0.13025 in SDXL"
    assert facts["text encoders"] == [
        "CLIP: 2 layers, 64 wide, quick_gelu",
        "CLIP: 3 layers, 64 wide, gelu",
    ]


def test_the_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "Flux\\u001bTransformer2DModel"}')
    with pytest.raises(ModelError, match=r"the folder of a Flux\\x1bTransformer2DModel"):
        inspect_path(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="not a JSON file that can be used"):
        inspect_path(tmp_path)


def test_a_unet_that_is_not_whole_is_refused(sd15_real: Path, tmp_path: Path) -> None:
    path = single_file(sd15_real, tmp_path / "m.safetensors", unet="bare", without=["vae", "text"])
    tensors = load_file(path)
    del tensors["out.0.bias"]
    save_file(tensors, path)
    with pytest.raises(ModelError, match="1 tensors do not fit the model") as refused:
        inspect_path(path)
    assert refused.value.problems == ("missing: norm_out.bias [32]",)


def save_header(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A file of half-precision tensors that are all zero but the last number, and no bytes."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "F16", "shape": [*shape], "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        file.seek(-1, 2)
        file.write(b"\x3c")
    return path


@pytest.mark.parametrize(("name", "config"), PUBLISHED.items(), ids=PUBLISHED)
def test_published_structures_have_their_names(
    name: str, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect_base, "sha256", lambda _: "not worked out: gigabytes of zeros")
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**config)
    shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    names = compvis_unet_names(shapes)
    path = save_header(tmp_path / "m.safetensors", {names[n]: s for n, s in shapes.items()})
    facts = inspect_path(path)
    assert facts["structure"] == name
    assert facts["parameters"]["unet"] == sum(map(math.prod, shapes.values()))
    path.unlink()

"""A file's tensors are sorted into their parts by their names alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eri.errors import ModelError
from eri.formats.single_file import SingleFile, read_single_file
from tests.families import single_file


def sorted_names(path: Path, *names: str) -> SingleFile:
    """A file with a tensor by each of these names."""
    save_file({name: torch.ones(1) for name in names}, path)
    return read_single_file(path)


@pytest.mark.parametrize(
    ("family", "options", "namings"),
    [
        ("sd15_real", {}, ["transformers"]),
        ("sd15_real", {"text": "without_text_model"}, ["transformers"]),
        ("sd21", {}, ["openclip"]),
        ("sd21", {"text": "sgm"}, ["openclip"]),
        ("sdxl", {}, ["transformers", "openclip"]),
    ],
)
def test_a_whole_model_has_every_part(
    family: str,
    options: dict[str, Any],
    namings: list[str],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    folder = request.getfixturevalue(family)
    path = single_file(folder, tmp_path / "a", loose=True, ema=True, **options)
    file = read_single_file(path)
    assert [tower.naming for tower in file.text] == namings
    assert file.has_unet and file.unet_naming == "compvis"
    assert "encoder.conv_in.weight" in file.vae
    assert file.ema == len(file.unet) + 2
    assert file.unused == ()
    name, info = file.unet["input_blocks.0.0.weight"]
    assert name == "model.diffusion_model.input_blocks.0.0.weight"
    assert info == file.header.tensors[name]


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["input_blocks.0.0.weight", "label_emb.0.0.weight"], "unet"),
        (["conv_in.weight", "up_blocks.0.attentions.1.norm.bias"], "unet"),
        (["unet.conv_in.weight"], "unet"),
        (["diffusion_model.out.0.bias"], "unet"),
        (["encoder.conv_in.weight", "quant_conv.bias"], "vae"),
        (["vae.decoder.conv_in.weight"], "vae"),
        (["text_model.final_layer_norm.bias", "text_projection.weight"], "text"),
        (["encoder.layers.0.mlp.fc1.weight", "final_layer_norm.weight"], "text"),
        (["positional_embedding", "transformer.resblocks.0.ln_1.bias", "text_projection"], "text"),
    ],
)
def test_a_part_alone(tmp_path: Path, names: list[str], part: str) -> None:
    file = sorted_names(tmp_path / "a", *names)
    found = {"unet": file.unet, "vae": file.vae, "text": file.text and file.text[0].names}
    assert {name for name, tensors in found.items() if tensors} == {part}
    assert {stored for stored, _ in found[part].values()} == set(names)
    assert not file.has_unet and not file.unused


def test_names_without_a_prefix_are_no_part_beside_those_with_one(tmp_path: Path) -> None:
    file = sorted_names(tmp_path / "a", "vae.quant_conv.bias", "conv_in.weight", "encoder.x")
    assert not file.unet
    assert [*file.vae] == ["quant_conv.bias"]
    assert file.unused == ("conv_in.weight", "encoder.x")


def test_of_two_copies_of_a_part_the_usual_one_is_used(tmp_path: Path) -> None:
    file = sorted_names(tmp_path / "a", "vae.quant_conv.bias", "first_stage_model.quant_conv.bias")
    assert file.vae["quant_conv.bias"][0] == "first_stage_model.quant_conv.bias"
    assert file.unused == ("vae.quant_conv.bias",)


@pytest.mark.parametrize("name", ["betas", "model.alphas_cumprod_prev", "v_pred", "logit_scale"])
def test_loose_tensors_are_expected(tmp_path: Path, name: str) -> None:
    assert sorted_names(tmp_path / "a", name, "conv_in.weight").unused == ()
    assert sorted_names(tmp_path / "a", f"x{name}", "conv_in.weight").unused == (f"x{name}",)


def test_a_unet_begins_and_ends(tmp_path: Path) -> None:
    assert sorted_names(tmp_path / "a", "conv_in.weight", "conv_out.weight").has_unet
    assert not sorted_names(tmp_path / "a", "conv_in.weight", "controlnet_mid_block.bias").has_unet


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_file({f"unet.{n}": torch.zeros(2, 2) for n in range(4)}, path)
    with pytest.raises(ModelError, match="all zero"):
        read_single_file(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="damaged"):
        read_single_file(path)

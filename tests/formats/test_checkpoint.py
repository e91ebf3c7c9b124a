"""A model's parts are the same in every layout, and what is no model is refused by its name."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eri.errors import ModelError
from eri.formats.checkpoint import text_parts, unet_part, vae_part
from eri.formats.parts import Pieces
from tests.families import single_file

UNET = "model.diffusion_model."
Sizes = dict[str, int]


def sizes(pieces: Pieces) -> Sizes:
    """How many numbers each tensor has; a 1x1 kernel may be left out of a shape."""
    return {name: math.prod(piece.shape) for name, piece in pieces.items()}


@pytest.fixture(params=["sd15_real", "sd21", "sdxl"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_a_single_file_has_the_parts_of_the_folder(folder: Path, tmp_path: Path) -> None:
    path = single_file(folder, tmp_path / "model.safetensors", loose=True, ema=True)
    assert sizes(unet_part(path).pieces) == sizes(unet_part(folder).pieces)
    ours, theirs = vae_part(path, "sdxl"), vae_part(folder)
    assert ours is not None and theirs is not None
    assert sizes(ours.pieces) == sizes(theirs.pieces)
    alone = [sizes(part.pieces) for part in text_parts(path)]
    assert alone == [sizes(part.pieces) for part in text_parts(folder)]
    assert len(alone) == (2 if (folder / "text_encoder_2").exists() else 1)
    assert unet_part(path).naming == "compvis" and unet_part(folder).naming == "diffusers"


def test_each_tensor_lies_where_its_piece_says(folder: Path, tmp_path: Path) -> None:
    path = single_file(folder, tmp_path / "model.safetensors")
    stored = load_file(path)
    for piece in unet_part(path).pieces.values():
        assert piece.file == path
        assert tuple(stored[piece.key].shape) == piece.shape


def test_the_scale_of_a_vae_is_its_configs_or_its_familys(sdxl: Path, tmp_path: Path) -> None:
    path = single_file(sdxl, tmp_path / "vae.safetensors", without=["unet", "text"])

    def scale(path: Path, family: str | None) -> float | None:
        part = vae_part(path, family)  # type: ignore[arg-type]
        assert part is not None
        return part.config.get("scaling_factor")

    assert scale(path, None) is None
    assert scale(path, "sdxl") == 0.13025
    assert scale(path, "sd15") == scale(path, "sd21") == 0.18215
    assert scale(sdxl, "sd15") == 0.13025
    assert scale(sdxl / "vae/diffusion_pytorch_model.safetensors", "sd15") == 0.13025


def test_the_config_beside_a_file_of_diffusers_is_read(sd15: Path, tmp_path: Path) -> None:
    """Shapes would say 32 groups and 8 heads, which this small model does not have."""
    file = sd15 / "unet/diffusion_pytorch_model.safetensors"
    assert (unet_part(file).fields.norm_groups, unet_part(file).fields.heads) == (16, (4,) * 4)
    alone = Path(shutil.copy(file, tmp_path / "unet.safetensors"))
    assert (unet_part(alone).fields.norm_groups, unet_part(alone).fields.heads) == (32, (8,) * 4)


def test_parts_that_are_not_there_are_none(sd15_real: Path, tmp_path: Path) -> None:
    path = single_file(sd15_real, tmp_path / "unet.safetensors", without=["vae", "text"])
    assert vae_part(path) is None
    assert text_parts(path) == ()


def test_what_else_lies_in_a_whole_model_is_not_used(sd15_real: Path, tmp_path: Path) -> None:
    extra = {f"control_model.{n}": torch.ones(2) for n in range(3)}
    path = single_file(sd15_real, tmp_path / "model.safetensors", extra=extra)
    assert sizes(unet_part(path).pieces) == sizes(unet_part(sd15_real).pieces)
    assert vae_part(path) is not None and len(text_parts(path)) == 1
    inside = single_file(
        sd15_real, tmp_path / "b.safetensors", extra={f"{UNET}input_hint_block.0.weight": UNIT}
    )
    with pytest.raises(ModelError, match="this is a ControlNet"):
        unet_part(inside)


UNIT = torch.ones(2, 2)
T5 = {"encoder.block.0.layer.0.SelfAttention.q.weight": UNIT}


@pytest.mark.parametrize(
    ("tensors", "read", "message"),
    [
        (T5, unet_part, "a T5 text encoder, not a model that eri trains"),
        (T5, vae_part, "a T5 text encoder, not a VAE"),
        (T5, text_parts, "a T5 text encoder, not a text encoder that eri reads"),
        ({"decoder.layers.0.weight": UNIT}, vae_part, "a tiny autoencoder"),
        ({"x": UNIT}, unet_part, "not a model that eri trains: eri knows none of its 1 tensors"),
        ({"x": UNIT}, vae_part, "not a VAE"),
        ({"x": UNIT}, text_parts, "not a text encoder"),
        ({"decoder.conv_in.weight": UNIT}, vae_part, "autoencoder is not whole"),
        ({"decoder.mid.x": UNIT}, vae_part, "belong to no autoencoder"),
        ({"unet.conv_in.x": UNIT}, unet_part, "1 tensors belong to no U-Net"),
        ({"input_blocks.0.0.weight": UNIT}, unet_part, "no downsampler"),
    ],
)
def test_what_is_no_such_part_is_refused_by_its_name(
    tmp_path: Path, tensors: dict, read: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    with pytest.raises(ModelError, match=message) as refused:
        read(path)
    assert refused.value.where == str(path) and refused.value.hint


def test_a_vae_of_newer_families_is_refused(sd15_real: Path, tmp_path: Path) -> None:
    path = single_file(sd15_real, tmp_path / "a.safetensors", without=["unet", "text"], vae="bare")
    tensors = load_file(path)
    tensors["decoder.conv_in.weight"] = torch.ones(64, 16, 3, 3)
    save_file(tensors, path)
    with pytest.raises(ModelError, match="latents of 16 channels"):
        vae_part(path)

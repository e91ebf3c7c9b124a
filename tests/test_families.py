"""The small models are whole, and diffusers reads the single files written from them back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.families import Tensors, single_file

UNET = "model.diffusion_model."
BIG_G = "conditioner.embedders.1.model."


def weights(folder: Path, part: str) -> Tensors:
    stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
    return load_file(folder / part / f"{stem}.safetensors")


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


@pytest.fixture(params=["sd15_real", "sd21", "sdxl"])
def family(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_diffusers_maps_the_unet_and_vae_of_a_single_file_back(family, tmp_path):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders import single_file_utils as oracle

    tensors = load_file(single_file(family, tmp_path / "model.safetensors"))
    unet = UNet2DConditionModel.load_config(family / "unet")
    vae = AutoencoderKL.load_config(family / "vae")
    found = oracle.convert_ldm_vae_checkpoint(dict(tensors), vae)
    assert same(found, weights(family, "vae"))
    found = oracle.convert_ldm_unet_checkpoint(dict(tensors), unet)
    assert same(found, weights(family, "unet"))


def test_diffusers_maps_open_clip_encoders_back(sd21, sdxl, tmp_path):
    from diffusers.loaders import single_file_utils as oracle

    tensors = load_file(single_file(sd21, tmp_path / "sd21.safetensors", without=["unet", "vae"]))
    found = oracle.convert_open_clip_checkpoint(None, tensors)
    expected = weights(sd21, "text_encoder")
    added = {name for name in found if ".layers.2." in name} | {"text_projection.weight"}
    assert len(added) == 17
    assert same({name: found[name] for name in found.keys() - added}, expected)
    tensors = load_file(single_file(sdxl, tmp_path / "sdxl.safetensors", without=["unet", "vae"]))
    found = oracle.convert_open_clip_checkpoint(None, tensors, prefix=BIG_G)
    assert same(found, weights(sdxl, "text_encoder_2"))

"""The small models are whole, and diffusers reads the single files written from them back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.compvis_names import Tensors
from tests.families import mixed, save_sd15_real, save_sd21, save_sdxl, single_file

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


def test_a_single_file_has_every_tensor_under_the_published_prefixes(family, tmp_path):
    text = {
        "sd15_real": {"cond_stage_model.transformer.text_model."},
        "sd21": {"cond_stage_model.model."},
        "sdxl": {"conditioner.embedders.0.transformer.text_model.", BIG_G},
    }[family.name]
    prefixes = (UNET, "first_stage_model.", *text)
    tensors = load_file(single_file(family, tmp_path / "model.safetensors"))
    found = {prefix for prefix in prefixes for name in tensors if name.startswith(prefix)}
    assert found == set(prefixes)
    assert all(name.startswith(prefixes) for name in tensors)


def test_clip_l_is_copied_under_its_prefix(sd15_real, sdxl, tmp_path):
    for folder, prefix in (
        (sd15_real, "cond_stage_model.transformer."),
        (sdxl, "conditioner.embedders.0.transformer."),
    ):
        whole = load_file(single_file(folder, tmp_path / "model.safetensors"))
        found = {name.removeprefix(prefix): whole[name] for name in whole if prefix in name}
        assert same(found, weights(folder, "text_encoder"))


def test_options_add_and_compose(sd15_real, tmp_path):
    path = single_file(
        sd15_real,
        tmp_path / "odd.safetensors",
        without=["vae"],
        dtype=mixed,
        text="without_text_model",
        ema=True,
        loose=True,
        position_ids=torch.float32,
        markers=["v_pred"],
        extra={"edm_mean": torch.ones(4)},
        metadata={"modelspec.title": "odd"},
    )
    tensors = load_file(path)
    weight = tensors[f"{UNET}output_blocks.2.1.conv.weight"]
    average = tensors["model_ema.diffusion_modeloutput_blocks21convweight"]
    assert weight.dtype == torch.float16 and average.dtype == torch.bfloat16
    torch.testing.assert_close(average.float(), 2 * weight.float(), rtol=2**-7, atol=1e-6)
    assert tensors[f"{UNET}out.2.bias"].dtype == torch.float32
    assert tensors["model_ema.num_updates"].dtype == torch.int32
    assert not [name for name in tensors if name.startswith("first_stage_model.")]
    assert not [name for name in tensors if "text_model" in name]
    ids = tensors["cond_stage_model.transformer.embeddings.position_ids"]
    assert ids.dtype == torch.float32 and ids.tolist() == [list(range(77))]
    assert tensors["alphas_cumprod"][999].item() == pytest.approx(0.0046600985, rel=1e-4)
    assert tensors["v_pred"].shape == (0,) and tensors["edm_mean"].shape == (4,)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"modelspec.title": "odd"}


def test_layouts_of_parts(sd21, tmp_path):
    def names(**options: Any) -> set[str]:
        return set(load_file(single_file(sd21, tmp_path / "part.safetensors", **options)))

    whole = names()
    unet = {name.removeprefix(UNET) for name in whole if name.startswith(UNET)}
    assert names(without=["vae", "text"], unet="bare") == unet
    assert names(without=["vae", "text"], unet="diffusers") == weights(sd21, "unet").keys()
    vae = {name for name in whole if name.startswith("first_stage_model.")}
    bare = names(without=["unet", "text"], vae="bare")
    assert {f"first_stage_model.{name}" for name in bare} == vae
    assert names(without=["unet", "text"], vae="vae.") == {f"vae.{name}" for name in bare}
    assert names(without=["unet", "text"], vae="diffusers") == weights(sd21, "vae").keys()
    old = names(without=["unet", "text"], vae="old_diffusers")
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in old and len(old) == len(bare)
    text = {name for name in whole if name.startswith("cond_stage_model.")}
    sgm = names(without=["unet", "vae"], text="sgm")
    assert sgm == {name.replace("cond_stage_model.", "conditioner.embedders.0.") for name in text}


def test_shapes_of_projections(sdxl, tmp_path):
    place = f"{UNET}middle_block.1.proj_in.weight"
    usual = load_file(single_file(sdxl, tmp_path / "a.safetensors"))
    path = single_file(sdxl, tmp_path / "b.safetensors", projection="weight", conv_projections=True)
    odd = load_file(path)
    assert torch.equal(odd[f"{BIG_G}text_projection.weight"], usual[f"{BIG_G}text_projection"].T)
    assert torch.equal(odd[place], usual[place][:, :, None, None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_one_dtype_for_all_weights_but_not_for_loose_tensors(sd15_real, tmp_path, dtype):
    path = single_file(sd15_real, tmp_path / "model.safetensors", dtype=dtype, loose=True)
    tensors = load_file(path)
    other = {name for name, tensor in tensors.items() if tensor.dtype != dtype}
    ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    schedule = {"alphas_cumprod", "betas", "log_one_minus_alphas_cumprod", "logvar"}
    assert other == schedule | {ids} and tensors[ids].dtype == torch.int64


def test_options_that_no_file_of_the_family_has_are_refused(sd15_real, sd21, tmp_path):
    with pytest.raises(ValueError, match="'sgm'"):
        single_file(sd15_real, tmp_path / "model.safetensors", text="sgm")
    with pytest.raises(ValueError, match="'without_text_model'"):
        single_file(sd21, tmp_path / "model.safetensors", text="without_text_model")
    with pytest.raises(ValueError, match="no such part"):
        single_file(sd21, tmp_path / "model.safetensors", without=["texts"])
    with pytest.raises(ValueError, match="moving average"):
        single_file(sd21, tmp_path / "model.safetensors", unet="bare", ema=True)


def test_tokenizers_have_clips_ids_and_pad_as_published(family):
    from transformers import CLIPTokenizer

    pads = {"tokenizer": 0 if family.name == "sd21" else 49407, "tokenizer_2": 0}
    for folder in sorted(family.glob("tokenizer*")):
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        ids = tokenizer("a photo of a cat", padding="max_length", max_length=9)["input_ids"]
        pad = pads[folder.name]
        assert ids == [49406, 320, 1125, 539, 320, 2368, 49407, pad, pad]
        assert len(tokenizer) == 49408


def test_fields_of_the_unet_can_be_replaced(tmp_path):
    folder = save_sd15_real(tmp_path / "inpainting", in_channels=9)
    assert weights(folder, "unet")["conv_in.weight"].shape == (32, 9, 3, 3)


def test_a_folder_is_the_same_every_time(family, tmp_path):
    save = {"sd15_real": save_sd15_real, "sd21": save_sd21, "sdxl": save_sdxl}[family.name]
    again = save(tmp_path / "again")
    for part in ("unet", "vae", "text_encoder"):
        assert same(weights(again, part), weights(family, part))

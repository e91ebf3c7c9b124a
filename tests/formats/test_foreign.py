"""Other kinds of models are told by the names that their own code writes; ours are not."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel

from eri.formats.foreign import foreign_kind, refusal
from eri.formats.header import read_header
from tests.compvis_names import compvis_unet_names
from tests.families import single_file
from tests.full_size import UNETS

ONE = {"num_layers": 1}
DOUBLE = {"num_layers": 1, "num_single_layers": 1}
NETS: list[tuple[str, dict[str, Any], str]] = [  # class of diffusers, its sizes, what it is
    ("SD3Transformer2DModel", ONE, "Stable Diffusion 3"),
    ("FluxTransformer2DModel", DOUBLE, "Flux"),
    ("Flux2Transformer2DModel", DOUBLE, "Flux 2"),
    ("HunyuanVideoTransformer3DModel", DOUBLE | {"num_refiner_layers": 1}, "Hunyuan Video"),
    ("PixArtTransformer2DModel", ONE, "PixArt"),
    ("DiTTransformer2DModel", ONE, "a transformer"),
    ("WanTransformer3DModel", ONE, "Wan"),
    ("Lumina2Transformer2DModel", ONE, "Lumina"),
    ("ZImageTransformer2DModel", {"n_layers": 1}, "Z-Image"),
    ("SanaTransformer2DModel", ONE, "Sana"),
    ("QwenImageTransformer2DModel", ONE, "Qwen-Image"),
    ("MochiTransformer3DModel", ONE, "Mochi"),
    ("CogVideoXTransformer3DModel", ONE, "CogVideoX"),
    (
        "AuraFlowTransformer2DModel",
        {"num_mmdit_layers": 1, "num_single_dit_layers": 1},
        "AuraFlow",
    ),
    ("ControlNetModel", {}, "a ControlNet"),
    ("SD3ControlNetModel", ONE, "a ControlNet"),
    ("T2IAdapter", {}, "a T2I-Adapter"),
    ("MotionAdapter", {}, "an AnimateDiff motion module"),
    ("UNetSpatioTemporalConditionModel", {}, "a video model"),
    ("AutoencoderTiny", {}, "a tiny autoencoder"),
    ("VQModel", {}, "an autoencoder of another kind"),
    ("AutoencoderKLWan", {}, "an autoencoder of another kind"),
    ("AutoencoderDC", {}, "an autoencoder of another kind"),
]
UNETS_OF_OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"encoder_hid_dim": 8, "encoder_hid_dim_type": "text_proj"}, "Kolors"),
    ({"time_cond_proj_dim": 8}, "LCM"),
    ({"num_class_embeds": 10, "in_channels": 7}, "the SD2 upscaler"),
    ({"class_embed_type": "projection", "projection_class_embeddings_input_dim": 8}, "unCLIP"),
    ({"attention_type": "gated"}, "GLIGEN"),
]
ORIGINAL = [  # names in files of the authors' own code
    ("model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias", "Diffusion 3"),
    ("double_blocks.0.img_attn.norm.key_norm.scale", "Flux"),
    ("distilled_guidance_layer.in_proj.bias", "Chroma"),
    ("double_layers.0.attn.w1q.weight", "AuraFlow"),
    ("txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias", "Hunyuan Video"),
    ("model.diffusion_model.cap_embedder.0.weight", "Lumina"),
    ("blocks.0.cross_attn.kv_linear.weight", "PixArt"),
    ("mlp_t5.0.weight", "Hunyuan-DiT"),
    ("clip_txt_mapper.weight", "Stable Cascade"),
    ("effnet_mapper.0.weight", "Stable Cascade"),
    ("model.diffusion_model.patchify_proj.weight", "LTX-Video"),
    ("net.blocks.block1.blocks.0.block.attn.to_q.0.weight", "a transformer"),
    ("control_model.input_blocks.0.0.weight", "a ControlNet"),
    ("lora_controlnet", "a Control-LoRA"),
    ("lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k.down.0.weight", "a ControlNet"),
    ("body.0.block1.weight", "a T2I-Adapter"),
    ("ip_adapter.0.to_q_lora.down.weight", "an IP-Adapter"),
    ("unet.down_blocks.0.attentions.0.processor.to_q_lora.down.weight", "a LoRA"),
    ("base_model.model.mid_block.attentions.0.proj_in.lora_A.default.weight", "a LoRA"),
    ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "a LoHa"),
    ("lora_unet_mid_block_attentions_0_proj_in.dora_scale", "a DoRA"),
    ("<cat-toy>", "an embedding"),
    ("model.1.sub.0.RDB1.conv1.0.weight", "an image upscaler"),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 text encoder"),
    ("model.layers.0.self_attn.q_proj.weight", "a language model"),
    ("vision_model.embeddings.class_embedding", "CLIP for images"),
]


@pytest.mark.parametrize(("net", "sizes", "what"), NETS, ids=[net for net, _, _ in NETS])
def test_nets_of_diffusers(net: str, sizes: dict[str, Any], what: str) -> None:
    with torch.device("meta"):
        found = foreign_kind(getattr(diffusers, net)(**sizes).state_dict())
    assert found is not None and what in found.what and not found.adapter


@pytest.mark.parametrize(("fields", "what"), UNETS_OF_OTHERS, ids=[w for _, w in UNETS_OF_OTHERS])
def test_unets_that_differ_in_little(fields: dict[str, Any], what: str) -> None:
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(block_out_channels=(32, 32, 64, 64), **fields)
    found = foreign_kind(unet.state_dict())
    assert found is not None and what in found.what


@pytest.mark.parametrize(("name", "what"), ORIGINAL)
def test_names_of_the_authors(name: str, what: str) -> None:
    found = foreign_kind(["conv_in.weight", name])
    assert found is not None and what in found.what
    assert found.adapter == (what in {"a LoRA", "a LoHa", "a DoRA"})


@pytest.mark.parametrize("family", UNETS)
def test_no_unet_of_ours_is_taken_for_something_else(family: str) -> None:
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**UNETS[family])
    theirs = compvis_unet_names(unet.state_dict())
    assert len(theirs) in (686, 1680)
    assert foreign_kind(theirs) is None
    assert foreign_kind(theirs.values()) is None
    assert foreign_kind(f"model.diffusion_model.{name}" for name in theirs.values()) is None


@pytest.mark.parametrize("family", ["sd15_real", "sd21", "sdxl"])
def test_no_part_of_ours_is_taken_for_something_else(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(family)
    for file in folder.rglob("*.safetensors"):
        names = list(read_header(file).tensors)
        assert foreign_kind(names) is None
        assert foreign_kind(name.removeprefix("text_model.") for name in names) is None
    path = single_file(folder, tmp_path / "model.safetensors", loose=True, ema=True)
    assert foreign_kind(read_header(path).tensors) is None


def test_what_is_not_known_is_listed_escaped(tmp_path: Path) -> None:
    error = refusal(tmp_path, [f"\x1b{n}" for n in range(7)], "a VAE")
    assert error.what == "this is not a VAE: eri knows none of its 7 tensors"
    assert error.problems[0] == r"\x1b0" and error.problems[-1] == "and 2 more"
    assert refusal(tmp_path, [], "a VAE").what == "this is not a VAE: it holds no tensors"
    named = refusal(tmp_path, ["double_blocks.0.img_attn.qkv.weight"], "a VAE")
    assert named.what == "this is Flux, not a VAE" and named.hint

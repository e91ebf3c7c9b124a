"""Names of the U-Net: one to one over every tensor of a real architecture."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from eri.errors import ModelError
from eri.formats.unet_names import MODULES, from_diffusers, to_diffusers


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def names(request: pytest.FixtureRequest) -> list[str]:
    """Every tensor name of diffusers' U-Net in full depth, on the meta device."""
    sdxl = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.device("meta"):
        return list(UNet2DConditionModel(**(sdxl if request.param == "sdxl" else {})).state_dict())


def test_one_to_one_over_a_whole_model(names: list[str]) -> None:
    ours = [from_diffusers(name) for name in names]
    assert len(set(ours)) == len(names) in {686, 1680}
    assert [to_diffusers(name) for name in ours] == names


def test_modules_map_like_their_tensors(names: list[str]) -> None:
    for name in names:
        module, _, parameter = name.rpartition(".")
        assert from_diffusers(name) == f"{from_diffusers(module)}.{parameter}"


def test_every_rule_goes_both_ways() -> None:
    for ours, theirs in MODULES.items():
        filled = ours.replace("{}", "7"), theirs.replace("{}", "7")
        assert (from_diffusers(filled[1]), to_diffusers(filled[0])) == filled


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            "down.1.layers.0.attention.blocks.0.attn2.to_out",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
        ),
        ("up.0.upsample.bias", "up_blocks.0.upsamplers.0.conv.bias"),
        ("mid.layers.1.resnet.time_proj.weight", "mid_block.resnets.1.time_emb_proj.weight"),
        ("norm_out.weight", "conv_norm_out.weight"),
    ],
)
def test_examples(ours: str, theirs: str) -> None:
    assert from_diffusers(theirs) == ours
    assert to_diffusers(ours) == theirs


@pytest.mark.parametrize(
    "name",
    [
        "",
        "down.0.downsample.weight",  # ours, not theirs
        "norm_out.weight",
        "mid_block.resnets.2.conv1.weight",
        "down_blocks.01.resnets.0.conv1.weight",
        "down_blocks.0.resnets.0.conv1.weight.weight",
        "down_blocks.0.resnets.0.time_proj.weight",
        "conv_in.weight\n",
        "joint_blocks.0.x_block",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match="no module or tensor"):
        from_diffusers(name)


def test_our_own_slip_is_a_bug() -> None:
    with pytest.raises(ValueError, match="no module or tensor"):
        to_diffusers("down_blocks.0.downsamplers.0.conv")

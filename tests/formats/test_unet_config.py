"""U-Net configs: the three families as published, and everything else refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel

from eri.errors import ModelError
from eri.formats.unet_config import AVERAGING, UNetConfigFields, unet_config

SD15 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
SD21 = SD15 | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
SDXL = SD21 | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
    "upcast_attention": None,
}


def read(folder: Path, config: dict[str, Any]) -> UNetConfigFields:
    (folder / "config.json").write_text(json.dumps(config))
    return unet_config(folder)


def test_sd15(tmp_path: Path) -> None:
    assert read(tmp_path, SD15) == UNetConfigFields(
        in_channels=4,
        out_channels=4,
        block_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        down_depths=((1, 1), (1, 1), (1, 1), (0, 0)),
        mid_depth=1,
        up_depths=((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
        heads=(8, 8, 8, 8),
        context_dim=768,
        linear_projection=False,
        norm_groups=32,
        norm_eps=1e-5,
        sample_size=64,
        pooled_dim=None,
        time_id_dim=None,
        upcast_attention=False,
    )


def test_sd21_has_linear_projections_and_heads_of_64(tmp_path: Path) -> None:
    found = read(tmp_path, SD21)
    assert found.linear_projection and found.upcast_attention
    assert found.heads == (5, 10, 20, 20)
    assert found.context_dim == 1024


def test_sdxl_has_added_conditions(tmp_path: Path) -> None:
    found = read(tmp_path, SDXL)
    assert found.down_depths == ((0, 0), (2, 2), (10, 10))
    assert found.mid_depth == 10
    assert found.up_depths == ((10, 10, 10), (2, 2, 2), (0, 0, 0))
    assert (found.pooled_dim, found.time_id_dim) == (1280, 256)


def test_a_shallower_sdxl_says_how_deep_each_transformer_is(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        SDXL
        | {
            "transformer_layers_per_block": [0, [2, 2], [4, 4]],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 0],
            "mid_block_type": "UNetMidBlock2D",
        },
    )
    assert found.down_depths == ((0, 0), (2, 2), (4, 4))
    assert found.mid_depth is None
    assert found.up_depths == ((4, 4, 10), (2, 1, 1), (0, 0, 0))


def test_what_diffusers_saves_is_read(tmp_path: Path) -> None:
    """Every field of today's diffusers is either read or known to be at its only value."""
    tiny = {"block_out_channels": (32, 64, 64, 64), "attention_head_dim": 4, "sample_size": 8}
    UNet2DConditionModel(**tiny, cross_attention_dim=24).save_config(tmp_path)
    found = unet_config(tmp_path)
    assert found.block_channels == (32, 64, 64, 64)
    assert found.context_dim == 24


def test_an_averaged_net_is_read_as_the_net_that_it_is(tmp_path: Path) -> None:
    """diffusers puts the settings of its EMAModel among the fields of the U-Net."""
    tiny = {"block_out_channels": (32, 64, 64, 64), "attention_head_dim": 4, "sample_size": 8}
    net = UNet2DConditionModel(**tiny, cross_attention_dim=24)
    averaged = EMAModel(net.parameters(), model_cls=type(net), model_config=net.config)
    net.save_pretrained(tmp_path / "unet")
    averaged.save_pretrained(tmp_path / "unet_ema")
    plain, added = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("unet", "unet_ema")
    )
    assert added.keys() - plain.keys() == {*AVERAGING}
    assert unet_config(tmp_path / "unet_ema") == unet_config(tmp_path / "unet")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"_class_name": "SD3Transformer2DModel"}, "_class_name is 'SD3Transformer2DModel'"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "down_block_types is"),
        ({"up_block_types": ["UpBlock2D"] * 4}, "the way down mirrored"),
        ({"block_out_channels": [320, 640, 1280]}, "block_out_channels is"),
        ({"block_out_channels": None}, "block_out_channels is missing"),
        ({"block_out_channels": [320, 640, 1280, 1290]}, "norm_num_groups is 32"),
        ({"attention_head_dim": 7}, "attention_head_dim is 7"),
        ({"attention_head_dim": [8, 8]}, "attention_head_dim is"),
        ({"cross_attention_dim": None}, "cross_attention_dim is missing"),
        ({"cross_attention_dim": [768, 768]}, "cross_attention_dim is"),
        ({"layers_per_block": [2, 2, 2, 2]}, "layers_per_block is"),
        ({"transformer_layers_per_block": 10**9}, "transformer_layers_per_block is"),
        ({"sample_size": [64, 64]}, "sample_size is"),
        ({"norm_eps": "1e-5"}, "norm_eps is"),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim is missing"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 1536,
            },
            "projection_class_embeddings_input_dim is 1536",
        ),
    ],
)
def test_wrong_sizes_are_refused(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        read(tmp_path, SD15 | change)


@pytest.mark.parametrize(
    "change",
    [
        {"act_fn": "gelu"},
        {"addition_embed_type": "image"},
        {"center_input_sample": True},
        {"class_embed_type": "projection"},
        {"downsample_padding": 0},
        {"dual_cross_attention": True},
        {"encoder_hid_dim": 4096},
        {"flip_sin_to_cos": False},
        {"freq_shift": 1},
        {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
        {"num_attention_heads": 8},
        {"resnet_time_scale_shift": "scale_shift"},
        {"time_cond_proj_dim": 256},
        {"a_field_of_next_year": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_unsupported_fields_are_refused_by_name(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="1 things") as refused:
        read(tmp_path, SD15 | change)
    name, value = next(iter(change.items()))
    assert refused.value.problems[0].startswith(f"{name} is {value!r}, supported is ")

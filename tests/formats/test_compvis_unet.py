"""Names in single files: those that diffusers' own converter takes, for every tensor of the real
U-Nets.

A digest below is the SHA-256 of the sorted lines `<diffusers name> <CompVis name>\n` of a whole
U-Net. They were taken from lists made by tracing tagged tensors of full-size U-Nets through
diffusers' converter of single files, and agree with ComfyUI's table.
"""

from collections.abc import Iterable
from functools import cache
from hashlib import sha256

import pytest
import torch
from diffusers import UNet2DConditionModel

from eri.errors import ModelError
from eri.formats.compvis_unet import from_compvis, layers_per_block, to_compvis
from eri.formats.unet_names import from_diffusers, to_diffusers

DIGESTS = {
    "sd15": "f999a38527833833a6a4a118a8bea9f09f5bf2431d97816d1026050e11369ec9",
    "sd21": "f999a38527833833a6a4a118a8bea9f09f5bf2431d97816d1026050e11369ec9",
    "sdxl": "ca885dc96f9c0e0dc959900ffad8c2387fad9eb103fad12b801c907bf5ed9aad",
}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CONFIGS = {
    "sd15": {},
    "sd21": {"use_linear_projection": True, "attention_head_dim": (5, 10, 20, 20)},
    "sdxl": SDXL,
    "ssd-1b": SDXL
    | {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    },
    "koala": SDXL | {"layers_per_block": 1, "transformer_layers_per_block": (1, 2, 6)},
}


@cache
def names(model: str) -> tuple[str, ...]:
    """Our name of every tensor of a full-size U-Net, on the meta device."""
    with torch.device("meta"):
        return tuple(map(from_diffusers, UNet2DConditionModel(**CONFIGS[model]).state_dict()))


def digest(pairs: Iterable[tuple[str, str]]) -> str:
    lines = sorted(f"{to_diffusers(ours)} {theirs}\n" for ours, theirs in pairs)
    return sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("model", DIGESTS)
def test_every_name_is_that_of_the_traced_lists(model: str) -> None:
    found = to_compvis(names(model))
    assert digest(found.items()) == DIGESTS[model]
    theirs = from_compvis(found.values())
    assert digest((ours, name) for name, ours in theirs.items()) == DIGESTS[model]


def test_a_wrong_slot_changes_the_digest() -> None:
    found = to_compvis(names("sdxl"))
    assert found["up.0.upsample.weight"] == "output_blocks.2.2.conv.weight"
    wrong = found | {"up.0.upsample.weight": "output_blocks.2.1.conv.weight"}
    assert digest(wrong.items()) != DIGESTS["sdxl"]


@pytest.mark.parametrize("model", CONFIGS)
def test_both_ways_are_inverse(model: str) -> None:
    found = to_compvis(names(model))
    assert tuple(found) == names(model)
    assert len(set(found.values())) == len(found)
    assert {theirs: ours for ours, theirs in found.items()} == from_compvis(found.values())


@pytest.mark.parametrize("model", CONFIGS)
def test_modules_are_named_like_their_tensors(model: str) -> None:
    modules = [name.rpartition(".")[0] for name in names(model)]
    tensors = to_compvis(names(model))
    assert to_compvis(modules) == {
        ours.rpartition(".")[0]: theirs.rpartition(".")[0] for ours, theirs in tensors.items()
    }


@pytest.mark.parametrize(
    ("model", "ours", "theirs"),
    [
        ("sd15", "conv_in.weight", "input_blocks.0.0.weight"),
        ("sd15", "norm_out.bias", "out.0.bias"),
        ("sd15", "down.0.layers.1.attention.proj_in.weight", "input_blocks.2.1.proj_in.weight"),
        ("sd15", "down.2.downsample.weight", "input_blocks.9.0.op.weight"),
        ("sd15", "up.0.upsample.weight", "output_blocks.2.1.conv.weight"),
        ("sd15", "up.1.upsample.weight", "output_blocks.5.2.conv.weight"),
        ("sd15", "mid.layers.1.resnet.time_proj.bias", "middle_block.2.emb_layers.1.bias"),
        ("sdxl", "add_embedding.linear_2.weight", "label_emb.0.2.weight"),
        (
            "sdxl",
            "down.1.layers.0.attention.blocks.1.attn2.to_out.weight",
            "input_blocks.4.1.transformer_blocks.1.attn2.to_out.0.weight",
        ),
        (
            "sdxl",
            "mid.layers.0.attention.blocks.9.ff.proj_in.bias",
            "middle_block.1.transformer_blocks.9.ff.net.0.proj.bias",
        ),
        (
            "sdxl",
            "up.2.layers.0.resnet.shortcut.weight",
            "output_blocks.6.0.skip_connection.weight",
        ),
        ("ssd-1b", "mid.layers.0.resnet.conv1.bias", "middle_block.0.in_layers.2.bias"),
        ("koala", "down.1.layers.0.resnet.conv1.bias", "input_blocks.3.0.in_layers.2.bias"),
        ("koala", "down.1.downsample.bias", "input_blocks.4.0.op.bias"),
        ("koala", "up.1.upsample.bias", "output_blocks.3.2.conv.bias"),
    ],
)
def test_examples(model: str, ours: str, theirs: str) -> None:
    found = to_compvis(names(model))
    assert found[ours] == theirs
    assert from_compvis(found.values())[theirs] == ours


def test_an_upsampler_is_known_in_either_slot() -> None:
    """Files were seen with it behind an attention that is not there, and the other way round."""
    for model, usual, other in (
        ("sd15", "output_blocks.2.1.conv", "output_blocks.2.2.conv"),
        ("sdxl", "output_blocks.5.2.conv", "output_blocks.5.1.conv"),
    ):
        usual_names = to_compvis(names(model)).values()
        moved = [name.replace(usual, other) for name in usual_names]
        found = from_compvis(moved)
        assert found[f"{other}.weight"] == from_compvis(usual_names)[f"{usual}.weight"]
        assert sorted(found.values()) == sorted(names(model))


def test_the_layers_of_a_level_are_counted() -> None:
    assert {model: layers_per_block(names(model)) for model in CONFIGS} == {
        "sd15": 2,
        "sd21": 2,
        "sdxl": 2,
        "ssd-1b": 2,
        "koala": 1,
    }


@pytest.mark.parametrize(
    "name",
    [
        "",
        "conv_in.weight",  # ours, and diffusers', not theirs
        "input_blocks.01.0.in_layers.0.weight",
        "input_blocks.3.1.proj_in.weight",  # a downsampler stands there
        "input_blocks.12.0.in_layers.0.weight",  # past the last level
        "input_blocks.1.0.in_layers.1.weight",
        "input_blocks.1.2.in_layers.0.weight",
        "input_blocks.5.0.op.weight",
        "middle_block.3.in_layers.0.weight",
        "output_blocks.2.0.op.weight",
        "output_blocks.1.2.conv.weight",
        "output_blocks.2.2.conv.weight",  # a second upsampler beside that in slot 1
        "out.1.weight",
        "out.2.weight\n",
        "joint_blocks.0.x_block.weight",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    usual = list(to_compvis(names("sd15")).values())
    with pytest.raises(ModelError, match="none that eri knows"):
        from_compvis([*usual, name])
    with pytest.raises(ModelError, match="none that eri knows"):
        from_compvis([name, *usual])


def test_names_that_are_refused_can_be_printed() -> None:
    usual = list(to_compvis(names("sd15")).values())
    with pytest.raises(ModelError, match=r"'a\\x1bb' first") as refused:
        from_compvis([*usual, "a\x1bb", *"12345678"])
    assert len(refused.value.problems) == 6


def test_blocks_that_cannot_be_counted_are_refused() -> None:
    usual = to_compvis(names("sd15")).values()
    with pytest.raises(ModelError, match="no downsampler"):
        from_compvis(name for name in usual if ".op." not in name)
    with pytest.raises(ValueError, match="no layer of the way down"):
        to_compvis(["conv_in"])
    with pytest.raises(ValueError, match="no module or tensor"):
        to_compvis([*names("sd15"), "down_blocks.0.downsamplers.0.conv"])

"""Names of the autoencoder: those of single files and of older diffusers, one to one to today's."""

import hashlib

import pytest
import torch
from diffusers import AutoencoderKL

from eri.errors import ModelError
from eri.formats.vae_names import current, from_compvis, is_compvis
from tests.compvis_names import compvis_vae_name

# SHA-256 of the sorted lines "<CompVis' name> <diffusers' name>" of a whole Stable Diffusion VAE
DIGEST = "7e7fe2987771ec98face710ea892d7df7f2690f7332258cd3ec2c2c38772dd55"


@pytest.fixture(scope="module")
def names() -> list[str]:
    """Of the VAE of Stable Diffusion, in diffusers."""
    config = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    }
    with torch.device("meta"):
        return list(AutoencoderKL(**config).state_dict())


def test_names_of_single_files_are_one_to_one(names: list[str]) -> None:
    theirs = [compvis_vae_name(name) for name in names]
    found = from_compvis(theirs)
    assert [found[name] for name in theirs] == names
    assert len(set(theirs)) == len(names) == 248
    assert is_compvis(theirs) and not is_compvis(names)


def test_the_map_is_the_published_one(names: list[str]) -> None:
    found = from_compvis([compvis_vae_name(name) for name in names])
    lines = "".join(f"{theirs} {name}\n" for theirs, name in sorted(found.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == DIGEST
    wrong = lines.replace("up_blocks.0", "up_blocks.3", 1)
    assert hashlib.sha256(wrong.encode()).hexdigest() != DIGEST


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            "encoder.down.1.block.0.nin_shortcut.bias",
            "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
        ),
        ("decoder.mid.attn_1.proj_out.weight", "decoder.mid_block.attentions.0.to_out.0.weight"),
        ("encoder.norm_out.weight", "encoder.conv_norm_out.weight"),
        ("post_quant_conv.bias", "post_quant_conv.bias"),
    ],
    ids=lambda name: name.split(".")[1],
)
def test_examples(theirs: str, ours: str) -> None:
    assert from_compvis([theirs]) == {theirs: ours}


def test_a_decoders_levels_are_counted_the_other_way(names: list[str]) -> None:
    levels = [f"decoder.up.{n}.block.0.conv1.bias" for n in range(4)]
    found = from_compvis(levels)
    assert found[levels[0]] == "decoder.up_blocks.3.resnets.0.conv1.bias"
    assert found[levels[3]] == "decoder.up_blocks.0.resnets.0.conv1.bias"


def test_what_no_autoencoder_has_is_refused() -> None:
    with pytest.raises(ModelError, match="2 tensors belong to no autoencoder") as refused:
        from_compvis(["decoder.mid.attn_2.q.weight", "quant_conv.weight", "loss.logvar"])
    assert refused.value.problems == ("decoder.mid.attn_2.q.weight", "loss.logvar")


def test_older_names_of_the_attention() -> None:
    assert current("encoder.mid_block.attentions.0.query.weight") == (
        "encoder.mid_block.attentions.0.to_q.weight"
    )
    assert current("decoder.mid_block.attentions.0.proj_attn.bias") == (
        "decoder.mid_block.attentions.0.to_out.0.bias"
    )


def test_todays_names_stay(names: list[str]) -> None:
    assert [current(name) for name in names] == names

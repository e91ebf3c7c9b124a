"""kohya's names and alphas; whether other programs agree is tested in test_adapter_file.py."""

import torch

from eri.formats.kohya import alphas, keys, weights
from eri.formats.lora_pair import LoRAPair
from eri.formats.unet_names import MODULES

TO_OUT = "down.0.layers.1.attention.blocks.0.attn1.to_out"
THEIRS = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0"


def pair(rank: int, alpha: float) -> LoRAPair:
    return LoRAPair(down=torch.ones(rank, 3), up=torch.ones(5, rank), alpha=alpha)


def test_keys_of_a_module() -> None:
    assert keys([TO_OUT]) == {
        f"{THEIRS}.lora_down.weight": (TO_OUT, "down"),
        f"{THEIRS}.lora_up.weight": (TO_OUT, "up"),
        f"{THEIRS}.alpha": (TO_OUT, "alpha"),
    }


def test_no_two_modules_share_a_key() -> None:
    modules = [name.replace("{}", number) for name in MODULES for number in ("0", "1", "11")]
    assert len(keys(modules)) == 3 * len(set(modules))


def test_one_alpha_is_written_beside_the_matrices() -> None:
    pairs = {TO_OUT: pair(2, 8.0), "conv_in": pair(4, 8.0)}
    assert weights(pairs)[f"{THEIRS}.lora_up.weight"].tolist() == torch.ones(5, 2).tolist()
    found = alphas(pairs)
    assert found[f"{THEIRS}.alpha"].shape == ()
    assert {float(value) for value in found.values()} == {8.0}


def test_several_alphas_are_folded_into_up() -> None:
    pairs = {TO_OUT: pair(2, 8.0), "conv_in": pair(4, 2.0)}
    assert alphas(pairs) == {}
    found = weights(pairs)
    assert found[f"{THEIRS}.lora_up.weight"].unique().tolist() == [4.0]
    assert found["lora_unet_conv_in.lora_up.weight"].unique().tolist() == [0.5]

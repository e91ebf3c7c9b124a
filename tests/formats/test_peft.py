"""Names and scales of PEFT and diffusers, against PEFT's own LoraConfig where it has a say."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from eri.formats.lora_pair import LoRAPair
from eri.formats.peft import DIFFUSERS_PREFIX, PEFT_PREFIX, alpha, config, keys, weights

TO_Q = "mid.layers.0.attention.blocks.0.attn2.to_q"
TO_OUT = "mid.layers.0.attention.blocks.0.attn2.to_out"
THEIRS = "mid_block.attentions.0.transformer_blocks.0.attn2"


def pair(rank: int, alpha: float) -> LoRAPair:
    return LoRAPair(down=torch.ones(rank, 3), up=torch.ones(5, rank), alpha=alpha)


def test_diffusers_has_three_generations_of_keys() -> None:
    found = {key for key, (module, _) in keys([TO_Q, TO_OUT], DIFFUSERS_PREFIX).items()}
    assert found == {
        f"unet.{THEIRS}.{key}"
        for layer, old in (("to_q", "to_q_lora"), ("to_out.0", "to_out_lora"))
        for key in (
            f"{layer}.lora_A.weight",
            f"{layer}.lora_B.weight",
            f"{layer}.lora.down.weight",
            f"{layer}.lora.up.weight",
            f"{layer}.alpha",
            f"processor.{old}.down.weight",
            f"processor.{old}.up.weight",
        )
    }


def test_peft_has_one() -> None:
    assert keys([TO_OUT], PEFT_PREFIX) == {
        f"base_model.model.{THEIRS}.to_out.0.lora_A.weight": (TO_OUT, "down"),
        f"base_model.model.{THEIRS}.to_out.0.lora_B.weight": (TO_OUT, "up"),
    }


def test_what_is_written_can_be_read() -> None:
    for prefix in (DIFFUSERS_PREFIX, PEFT_PREFIX):
        assert (
            weights({TO_Q: pair(2, 1), "conv_in": pair(2, 1)}, prefix).keys()
            <= keys([TO_Q, "conv_in"], prefix).keys()
        )


PAIRS = {TO_Q: pair(4, 8.0), TO_OUT: pair(4, 2.0), "conv_in": pair(2, 8.0), "conv_out": pair(4, 8)}


def test_config_gives_every_module_its_rank_and_alpha() -> None:
    """PEFT's own way to find a module's rank and alpha ends at those of the pairs."""
    found = LoraConfig(**config(PAIRS))
    names = {module: key for key, (module, part) in keys(PAIRS, "").items() if part == "down"}
    for module, pair in PAIRS.items():
        name = names[module].removesuffix(".lora_A.weight")
        rank_key = get_pattern_key(list(found.rank_pattern), name)
        alpha_key = get_pattern_key(list(found.alpha_pattern), name)
        assert found.rank_pattern.get(rank_key, found.r) == pair.rank
        assert found.alpha_pattern.get(alpha_key, found.lora_alpha) == pair.alpha
        assert alpha(config(PAIRS), module, pair.rank) == pair.alpha


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 4.0),
        ({"lora_alpha": 2}, 2.0),
        ({"lora_alpha": 2, "use_rslora": True}, 4.0),
        ({"lora_alpha": 2, "alpha_pattern": {f"{THEIRS}.to_q": 6}}, 6.0),
        ({"lora_alpha": 2, "alpha_pattern": {"to_q": 6, "attn2.to_q": 7}}, 6.0),
        ({"lora_alpha": 2, "alpha_pattern": {"^to_q": 6, r"attn2\.to_q$": 7}}, 7.0),
        ({"lora_alpha": 2, "alpha_pattern": {"o_q": 6, "to_k": 7}}, 2.0),
        ({"lora_alpha": 2, "alpha_pattern": None, "init_lora_weights": "gaussian"}, 2.0),
    ],
)
def test_alpha_of_a_config(fields: dict[str, Any], expected: float) -> None:
    assert alpha(fields, TO_Q, 4) == expected


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base model"),
        ({"lora_alpha": "8"}, "alpha is '8'"),
        ({"lora_alpha": None}, "alpha is None"),
        ({"lora_alpha": float("inf")}, "alpha is inf"),
        ({"lora_alpha": 10**400}, "alpha is 1000"),
        ({"alpha_pattern": [1]}, "alpha_pattern is a list"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "no plain name"),
        ({"alpha_pattern": {".*": 1}}, "no plain name"),
    ],
)
def test_other_configs_are_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        alpha(fields, TO_Q, 4)

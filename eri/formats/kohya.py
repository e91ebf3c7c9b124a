"""The adapter dialect of kohya's scripts and the UIs: module names with underscores, an alpha each.

    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight    [r, in] or [r, in, kh, kw]
    lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight      [out, r] or [out, r, 1, 1]
    lora_unet_down_blocks_0_attentions_0_proj_in.alpha               []; without it alpha is r

An underscore says nothing about where a dot was, so names are looked up in a table made from the
model's own modules.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from eri.formats.lora_pair import KeyTable, LoRAPair, Part
from eri.formats.unet_names import to_diffusers

__all__ = ["alphas", "keys", "weights"]

PARTS: dict[str, Part] = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}


def keys(modules: Iterable[str]) -> KeyTable:
    """The keys that a file for these modules may hold."""
    return {
        f"{_name(module)}.{ending}": (module, part)
        for module in modules
        for ending, part in PARTS.items()
    }


def weights(pairs: Mapping[str, LoRAPair]) -> dict[str, Tensor]:
    """The matrices by key.

    diffusers gives an attention layer whose alpha is not the file's most common one that common
    alpha, without a word. So where alphas differ the scale is multiplied into `up`, and the file
    holds no alphas: every reader then takes a scale of 1.
    """
    found = {}
    for module, pair in pairs.items():
        scale = 1 if _one_alpha(pairs) else pair.alpha / pair.rank
        found[f"{_name(module)}.lora_down.weight"] = pair.down
        found[f"{_name(module)}.lora_up.weight"] = pair.up * scale
    return found


def alphas(pairs: Mapping[str, LoRAPair]) -> dict[str, Tensor]:
    """The alphas by key, in float32 whatever the matrices are in: readers take any number."""
    if not _one_alpha(pairs):
        return {}
    return {
        f"{_name(module)}.alpha": torch.tensor(pair.alpha, dtype=torch.float32)
        for module, pair in pairs.items()
    }


def _name(module: str) -> str:
    return "lora_unet_" + to_diffusers(module).replace(".", "_")


def _one_alpha(pairs: Mapping[str, LoRAPair]) -> bool:
    return len({pair.alpha for pair in pairs.values()}) <= 1

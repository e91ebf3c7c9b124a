"""The adapter dialect of kohya's scripts and the UIs: module names with underscores, an alpha each.

    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight    [r, in] or [r, in, kh, kw]
    lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight      [out, r] or [out, r, 1, 1]
    lora_unet_down_blocks_0_attentions_0_proj_in.alpha               []; without it alpha is r

kohya's scripts name the modules of SD1.x and SD2.x as diffusers does, those of SDXL as CompVis'
code: lora_unet_input_blocks_4_1_proj_in. Readers take both for every family, and so does this one.

An underscore says nothing about where a dot was, so names are looked up in a table made from the
model's own modules.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from eri.formats.compvis_unet import layers_per_block, to_compvis
from eri.formats.lora_pair import KeyTable, LoRAPair, Part
from eri.formats.unet_names import to_diffusers

__all__ = ["alphas", "keys", "weights"]

PARTS: dict[str, Part] = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}
LAYERS = 2  # of each level in every model that kohya's scripts train
ONLY_SDXL = "add_embedding.linear_1"


def keys(modules: Iterable[str]) -> KeyTable:
    """The keys that a file for a net may hold, in either spelling.

    Blocks are counted in one of them, so a key means something else in a net with fewer layers;
    for such nets nothing writes it, and it is not taken.

    Args:
        modules: our names of every linear layer and convolution of the net.
    """
    modules = list(modules)
    spellings = [_like_diffusers(modules)]
    if layers_per_block(modules) == LAYERS:
        spellings.append(_like_compvis(modules))
    return {
        f"{name}.{ending}": (module, part)
        for names in spellings
        for module, name in names.items()
        for ending, part in PARTS.items()
    }


def weights(
    pairs: Mapping[str, LoRAPair], modules: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """The matrices by key.

    diffusers gives an attention layer whose alpha is not the file's most common one that common
    alpha, without a word. So where alphas differ the scale is multiplied into `up`, and the file
    holds no alphas: every reader then takes a scale of 1.

    Args:
        pairs: by our module names.
        modules: our names of every linear layer and convolution of the net, for SDXL to be told
            by; None where they are not known.
    """
    names = _names(pairs, modules)
    scaled = not _one_alpha(pairs)
    found = {}
    for module, pair in pairs.items():
        found[f"{names[module]}.lora_down.weight"] = pair.down
        found[f"{names[module]}.lora_up.weight"] = _scaled_up(pair) if scaled else pair.up
    return found


def alphas(
    pairs: Mapping[str, LoRAPair], modules: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """The alphas by key, in float32 whatever the matrices are in: readers take any number."""
    if not _one_alpha(pairs):
        return {}
    names = _names(pairs, modules)
    return {
        f"{names[module]}.alpha": torch.tensor(pair.alpha, dtype=torch.float32)
        for module, pair in pairs.items()
    }


def _names(pairs: Iterable[str], modules: Iterable[str] | None) -> dict[str, str]:
    """The names that are written: kohya's own for SDXL, else diffusers', which all readers take."""
    modules = list(modules or ())
    if ONLY_SDXL in modules and layers_per_block(modules) == LAYERS:
        return _like_compvis(modules)
    return _like_diffusers(pairs)


def _like_diffusers(modules: Iterable[str]) -> dict[str, str]:
    return {module: "lora_unet_" + to_diffusers(module).replace(".", "_") for module in modules}


def _like_compvis(modules: Iterable[str]) -> dict[str, str]:
    return {
        module: "lora_unet_" + name.replace(".", "_")
        for module, name in to_compvis(modules).items()
    }


def _scaled_up(pair: LoRAPair) -> Tensor:
    """In float32 at least: 16 bits would round it before it is written in a larger type."""
    up = pair.up.to(torch.promote_types(pair.up.dtype, torch.float32))
    return up * (pair.alpha / pair.rank)


def _one_alpha(pairs: Mapping[str, LoRAPair]) -> bool:
    return len({pair.alpha for pair in pairs.values()}) <= 1

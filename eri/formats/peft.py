"""The adapter dialects of PEFT and diffusers: module names with dots, the scale in a config.

    base_model.model.down_blocks.0.attentions.0.proj_in.lora_A.weight      a folder of PEFT
    unet.down_blocks.0.attentions.0.proj_in.lora_A.weight                  a file of diffusers

lora_A is the down matrix, lora_B the up matrix. PEFT keeps the scale in adapter_config.json,
diffusers the same fields in the header of the file; older files of diffusers spell the matrices in
two other ways and have no scale but 1.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from eri.formats.lora_pair import KeyTable, LoRAPair, Part
from eri.formats.unet_names import to_diffusers

__all__ = ["DIFFUSERS_PREFIX", "PEFT_PREFIX", "alpha", "config", "keys", "weights"]

DIFFUSERS_PREFIX = "unet."
PEFT_PREFIX = "base_model.model."

PARTS: dict[str, Part] = {"lora_A.weight": "down", "lora_B.weight": "up"}
OLDER_PARTS: dict[str, Part] = {
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "alpha": "alpha",
}
PROCESSOR_PARTS: dict[str, Part] = {"down.weight": "down", "up.weight": "up"}
ATTENTION_LAYER = re.compile(r"(.+\.attn[12])\.(to_[qkv]|to_out)(?:\.0)?")
MAX_ALPHA = 1e6
LEAVES_BASE_ALONE = (None, True, False, "gaussian", "orthogonal")


def keys(modules: Iterable[str], prefix: str) -> KeyTable:
    """The keys that a file for these modules may hold."""
    table: KeyTable = {}
    for module in modules:
        name = prefix + to_diffusers(module)
        table |= {f"{name}.{ending}": (module, part) for ending, part in PARTS.items()}
        if prefix != DIFFUSERS_PREFIX:
            continue
        table |= {f"{name}.{ending}": (module, part) for ending, part in OLDER_PARTS.items()}
        if layer := ATTENTION_LAYER.fullmatch(name):
            table |= {
                f"{layer[1]}.processor.{layer[2]}_lora.{ending}": (module, part)
                for ending, part in PROCESSOR_PARTS.items()
            }
    return table


def weights(pairs: Mapping[str, LoRAPair], prefix: str) -> dict[str, Tensor]:
    """The matrices by key."""
    found = {}
    for module, pair in pairs.items():
        found[f"{prefix}{to_diffusers(module)}.lora_A.weight"] = pair.down
        found[f"{prefix}{to_diffusers(module)}.lora_B.weight"] = pair.up
    return found


def config(pairs: Mapping[str, LoRAPair]) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig that say which modules, ranks and alphas."""
    named = {to_diffusers(module): pair for module, pair in pairs.items()}
    rank = Counter(pair.rank for pair in named.values()).most_common(1)[0][0]
    common = Counter(pair.alpha for pair in named.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": common,
        "target_modules": sorted(named),
        "rank_pattern": {name: pair.rank for name, pair in named.items() if pair.rank != rank},
        "alpha_pattern": {name: p.alpha for name, p in named.items() if p.alpha != common},
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
    }


def alpha(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The alpha of one module, out of the fields of a LoraConfig.

    Raises:
        ValueError: the fields describe something other than LoRA, or hold no number.
    """
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"peft_type is {config['peft_type']!r}, supported is 'LORA'")
    if config.get("init_lora_weights") not in LEAVES_BASE_ALONE:
        raise ValueError(
            f"init_lora_weights {config['init_lora_weights']!r} changes the base model"
        )
    value = config.get("lora_alpha", rank)
    name = to_diffusers(module)
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"alpha_pattern is a {type(patterns).__name__}, not a map")
    for pattern, special in patterns.items():
        if _stands_for(pattern, name):
            value = special
            break
    if type(value) not in (int, float) or not abs(value) < MAX_ALPHA:
        raise ValueError(f"alpha is {value!r}, not a number below {MAX_ALPHA:g}")
    # rank-stabilised LoRA (arXiv 2312.03732) divides by √r, every other file by r
    return value * rank**0.5 if config.get("use_rslora") else float(value)


def _stands_for(pattern: str, name: str) -> bool:
    """Whether a pattern is a module's name or the end of it; PEFT would take any expression."""
    literal = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not re.fullmatch(r"[\w.]+", literal):
        raise ValueError(f"the pattern {pattern!r} is no plain name of a module")
    return name == literal or (name.endswith("." + literal) and not pattern.startswith("^"))

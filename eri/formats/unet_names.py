"""Names of the U-Net's modules and tensors: ours and those of diffusers, one to one."""

import re
from collections.abc import Iterable

from eri.errors import ModelError
from eri.printable import printable

__all__ = ["IN_ATTENTION", "from_diffusers", "renaming", "to_diffusers", "translate"]

# Ours to theirs; {} stands for a number. Places first, then what stands in a place of a kind.
SINGLE = {
    "conv_in": "conv_in",
    "conv_out": "conv_out",
    "norm_out": "conv_norm_out",
    "time_embedding.linear_1": "time_embedding.linear_1",
    "time_embedding.linear_2": "time_embedding.linear_2",
    "add_embedding.linear_1": "add_embedding.linear_1",
    "add_embedding.linear_2": "add_embedding.linear_2",
    "down.{}.downsample": "down_blocks.{}.downsamplers.0.conv",
    "up.{}.upsample": "up_blocks.{}.upsamplers.0.conv",
}
RESNETS = {
    "down.{}.layers.{}.resnet": "down_blocks.{}.resnets.{}",
    "mid.layers.0.resnet": "mid_block.resnets.0",
    "mid.layers.1.resnet": "mid_block.resnets.1",
    "up.{}.layers.{}.resnet": "up_blocks.{}.resnets.{}",
}
IN_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time_proj": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "shortcut": "conv_shortcut",
}
ATTENTIONS = {
    "down.{}.layers.{}.attention": "down_blocks.{}.attentions.{}",
    "mid.layers.0.attention": "mid_block.attentions.0",
    "up.{}.layers.{}.attention": "up_blocks.{}.attentions.{}",
}
IN_ATTENTION = {
    "norm": "norm",
    "proj_in": "proj_in",
    "proj_out": "proj_out",
    "blocks.{}.norm1": "transformer_blocks.{}.norm1",
    "blocks.{}.attn1.to_q": "transformer_blocks.{}.attn1.to_q",
    "blocks.{}.attn1.to_k": "transformer_blocks.{}.attn1.to_k",
    "blocks.{}.attn1.to_v": "transformer_blocks.{}.attn1.to_v",
    "blocks.{}.attn1.to_out": "transformer_blocks.{}.attn1.to_out.0",
    "blocks.{}.norm2": "transformer_blocks.{}.norm2",
    "blocks.{}.attn2.to_q": "transformer_blocks.{}.attn2.to_q",
    "blocks.{}.attn2.to_k": "transformer_blocks.{}.attn2.to_k",
    "blocks.{}.attn2.to_v": "transformer_blocks.{}.attn2.to_v",
    "blocks.{}.attn2.to_out": "transformer_blocks.{}.attn2.to_out.0",
    "blocks.{}.norm3": "transformer_blocks.{}.norm3",
    "blocks.{}.ff.proj_in": "transformer_blocks.{}.ff.net.0.proj",
    "blocks.{}.ff.proj_out": "transformer_blocks.{}.ff.net.2",
}
MODULES = SINGLE | {
    f"{place}.{inner}": f"{their_place}.{their_inner}"
    for places, inners in ((RESNETS, IN_RESNET), (ATTENTIONS, IN_ATTENTION))
    for place, their_place in places.items()
    for inner, their_inner in inners.items()
}

Renaming = list[tuple[re.Pattern[str], str]]


def renaming(pairs: Iterable[tuple[str, str]]) -> Renaming:
    """Rules from name to name of modules, and of their weights and biases; {} is a number."""
    number, ending = r"(0|[1-9][0-9]?)", r"(\.weight|\.bias|)"
    return [
        (re.compile(re.escape(source).replace(r"\{\}", number) + ending), target + "{}")
        for source, target in pairs
    ]


TO_DIFFUSERS = renaming(MODULES.items())
FROM_DIFFUSERS = renaming((theirs, ours) for ours, theirs in MODULES.items())


def to_diffusers(name: str) -> str:
    """The name in diffusers of a module or a tensor of our U-Net.

    Raises:
        ValueError: our U-Net has no such module.
    """
    translated = translate(name, TO_DIFFUSERS)
    if translated is None:
        raise ValueError(f"{name!r} is no module or tensor of the U-Net")
    return translated


def from_diffusers(name: str) -> str:
    """Our name of a module or a tensor of diffusers' U-Net.

    Raises:
        ModelError: a U-Net of these families has no such module.
    """
    translated = translate(name, FROM_DIFFUSERS)
    if translated is None:
        raise ModelError(f"'{printable(name)}' is no module or tensor of a U-Net that eri knows")
    return translated


def translate(name: str, rules: Renaming) -> str | None:
    """The other name by the one rule that fits; None where none does."""
    for pattern, target in rules:
        if match := pattern.fullmatch(name):
            return target.format(*match.groups())
    return None

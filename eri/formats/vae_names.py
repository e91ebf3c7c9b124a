"""Names of the autoencoder's tensors, all to those of today's diffusers.

    CompVis                            diffusers
    encoder.down.I.block.J             encoder.down_blocks.I.resnets.J
    decoder.up.I.block.J               decoder.up_blocks.(levels - 1 - I).resnets.J
    mid.block_1, mid.attn_1.q          mid_block.resnets.0, mid_block.attentions.0.to_q
    nin_shortcut, norm_out             conv_shortcut, conv_norm_out

Diffusers before 0.17 named the middle attention's layers query, key, value and proj_attn.
"""

import re
from collections.abc import Iterable

from eri.errors import ModelError
from eri.printable import first_few

__all__ = ["current", "from_compvis", "is_compvis"]

ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_ATTENTION = re.compile(
    rf"((?:en|de)coder\.mid_block\.attentions\.0)\.({'|'.join(ATTENTION)})\.(weight|bias)"
)

COMPVIS = re.compile(r"(?:en|de)coder\.(?:down|up|mid)\.")
MIDDLE = {
    "block_1": "resnets.0",
    "block_2": "resnets.1",
    "attn_1.norm": "attentions.0.group_norm",
    "attn_1.q": "attentions.0.to_q",
    "attn_1.k": "attentions.0.to_k",
    "attn_1.v": "attentions.0.to_v",
    "attn_1.proj_out": "attentions.0.to_out.0",
}
IN_RESNET = r"(norm1|conv1|norm2|conv2|nin_shortcut)\.(weight|bias)"
LEVEL = re.compile(rf"(encoder|decoder)\.(?:down|up)\.(\d)\.block\.(\d)\.{IN_RESNET}")
RESAMPLER = re.compile(
    r"(encoder|decoder)\.(?:down|up)\.(\d)\.(?:downsample|upsample)\.conv\.(weight|bias)"
)
MID = re.compile(rf"(encoder|decoder)\.mid\.({'|'.join(map(re.escape, MIDDLE))})\.(.+)")
SAME = re.compile(
    r"(?:(?:en|de)coder\.(?:conv_in|conv_out|norm_out)|quant_conv|post_quant_conv)\.(?:weight|bias)"
)
UP_LEVEL = re.compile(r"decoder\.up\.(\d)\.")


def current(name: str) -> str:
    """Today's name of a tensor in diffusers' names of any age."""
    match = OLD_ATTENTION.fullmatch(name)
    return name if match is None else f"{match[1]}.{ATTENTION[match[2]]}.{match[3]}"


def is_compvis(names: Iterable[str]) -> bool:
    """Whether an autoencoder's tensors have the names of single files."""
    return any(map(COMPVIS.match, names))


def from_compvis(names: Iterable[str]) -> dict[str, str]:
    """The name in diffusers of each name in a single file.

    Args:
        names: of every tensor of one autoencoder, without `first_stage_model.`.

    Raises:
        ModelError: a name is none of an autoencoder's.
    """
    names = list(names)
    levels = 1 + max((int(m[1]) for m in filter(None, map(UP_LEVEL.match, names))), default=-1)
    found = {name: _renamed(name, levels) for name in names}
    unknown = [name for name, renamed in found.items() if renamed is None]
    if unknown:
        what = f"{len(unknown)} tensors belong to no autoencoder"
        raise ModelError(what, problems=first_few(unknown))
    return {name: renamed for name, renamed in found.items() if renamed is not None}


def _renamed(name: str, levels: int) -> str | None:
    if SAME.fullmatch(name):
        return name.replace("norm_out", "conv_norm_out")
    if match := LEVEL.fullmatch(name):
        side, level, layer, inner, kind = match.groups()
        inner = inner.replace("nin_shortcut", "conv_shortcut")
        return f"{_level(side, int(level), levels)}.resnets.{layer}.{inner}.{kind}"
    if match := RESAMPLER.fullmatch(name):
        side, level, kind = match.groups()
        resampler = "downsamplers" if side == "encoder" else "upsamplers"
        return f"{_level(side, int(level), levels)}.{resampler}.0.conv.{kind}"
    if match := MID.fullmatch(name):
        side, place, rest = match.groups()
        return f"{side}.mid_block.{MIDDLE[place]}.{rest}"
    return None


def _level(side: str, level: int, levels: int) -> str:
    """A decoder's levels are counted from the image inwards there, and outwards in diffusers."""
    return (
        f"encoder.down_blocks.{level}"
        if side == "encoder"
        else (f"decoder.up_blocks.{levels - 1 - level}")
    )

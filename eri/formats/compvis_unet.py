"""Names of the U-Net in single files: those of CompVis' and Stability's code, one to one to ours.

    input_blocks.N    0 is conv_in; then come the layers of each level and its downsampler
    middle_block.N    resnet, attention, resnet
    output_blocks.N   the layers of each level; its last one also holds its upsampler
    ….0 is a resnet, ….1 an attention; an upsampler takes the first number after them

Blocks are counted through all levels, so where a place lies follows from how many layers the levels
have: names are translated for a whole U-Net at once.
"""

import re
from collections.abc import Iterable, Mapping

from eri.errors import ModelError
from eri.formats.unet_names import IN_ATTENTION, Renaming, renaming, translate
from eri.printable import first_few, printable

__all__ = ["from_compvis", "layers_per_block", "to_compvis"]

FIXED = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "norm_out": "out.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid.layers.0.resnet": "middle_block.0",
    "mid.layers.0.attention": "middle_block.1",
    "mid.layers.1.resnet": "middle_block.2",
}
IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "shortcut": "skip_connection",
}
# What follows a place, by the last word of our name of the place; every other place is a module.
INSIDE = {
    "resnet": [(f".{ours}", f".{theirs}") for ours, theirs in IN_RESNET.items()],
    "attention": [(f".{ours}", f".{theirs}") for ours, theirs in IN_ATTENTION.items()],
}
MODULE = renaming([("", "")])
TO_COMPVIS = {word: renaming(pairs) for word, pairs in INSIDE.items()}
FROM_COMPVIS = {
    word: renaming((theirs, ours) for ours, theirs in pairs) for word, pairs in INSIDE.items()
}

DOWN_LAYER = re.compile(r"down\.(\d+)\.layers\.(\d+)\..+")
DOWNSAMPLER = re.compile(r"input_blocks\.([1-9]\d?)\.0\.op(?:\..+)?")
UPSAMPLER = re.compile(r"output_blocks\.(\d\d?)\.([12])\.conv(?:\..+)?")


def layers_per_block(names: Iterable[str]) -> int:
    """How many layers each level of the way down has; the way up has one more.

    Args:
        names: ours, of every module or of every tensor of one U-Net.

    Raises:
        ValueError: no layer of the way down is among them.
    """
    return 1 + max(layer for _, layer in _down_layers(names))


def to_compvis(names: Iterable[str]) -> dict[str, str]:
    """The name in single files, without `model.diffusion_model.`, of each name of ours.

    Args:
        names: ours, of every module or of every tensor of one U-Net; if some were left out, the
            blocks could be counted wrong.

    Raises:
        ValueError: our U-Net has no such module, or no layer of the way down is among them.
    """
    names = list(names)
    layers = layers_per_block(names)
    levels = 1 + max(level for level, _ in _down_layers(names))
    last = {level: f"up.{level}.layers.{layers}.attention." for level in range(levels)}
    slots = {
        level: 2 if any(name.startswith(place) for name in names) else 1
        for level, place in last.items()
    }
    places = _places(levels, layers, slots)
    table = {place: (theirs, _inside(place, TO_COMPVIS)) for place, theirs in places.items()}
    found = {name: _renamed(name, table) for name in names}
    if unknown := [name for name, renamed in found.items() if not renamed]:
        raise ValueError(f"{unknown[0]!r} is no module or tensor of the U-Net")
    return found


def from_compvis(names: Iterable[str]) -> dict[str, str]:
    """Our name of each name in a single file.

    Args:
        names: of every tensor of one U-Net, without `model.diffusion_model.`.

    Raises:
        ModelError: the U-Nets of these families have no such tensor, or its downsamplers, by which
            the blocks are counted, are missing.
    """
    names = list(names)
    ends = {int(match[1]) for name in names if (match := DOWNSAMPLER.fullmatch(name))}
    if not ends:
        raise ModelError("its U-Net has no downsampler, input_blocks.3.0.op or the like")
    stride = min(ends)
    slots = {
        int(match[1]) // stride: int(match[2])
        for name in names
        if (match := UPSAMPLER.fullmatch(name))
    }
    places = _places(len(ends) + 1, stride - 1, slots)
    table = {theirs: (place, _inside(place, FROM_COMPVIS)) for place, theirs in places.items()}
    found = {name: _renamed(name, table) for name in names}
    if unknown := [name for name, renamed in found.items() if not renamed]:
        raise _refused(unknown)
    return found


def _down_layers(names: Iterable[str]) -> list[tuple[int, int]]:
    """Level and number of the layers of the way down, as often as they are named."""
    matches = (DOWN_LAYER.fullmatch(name) for name in names)
    found = [(int(match[1]), int(match[2])) for match in matches if match]
    if not found:
        raise ValueError("no layer of the way down is among the names; a whole U-Net has some")
    return found


def _places(levels: int, layers: int, slots: Mapping[int, int]) -> dict[str, str]:
    """Their name of every place that a U-Net may have, by ours.

    Args:
        levels: of the way down.
        layers: of each of them.
        slots: number in its block of each level's upsampler.
    """
    stride = layers + 1
    places = dict(FIXED)
    for level in range(levels):
        first = level * stride
        for layer in range(layers):
            place = f"down.{level}.layers.{layer}"
            places[f"{place}.resnet"] = f"input_blocks.{first + layer + 1}.0"
            places[f"{place}.attention"] = f"input_blocks.{first + layer + 1}.1"
        places[f"down.{level}.downsample"] = f"input_blocks.{first + stride}.0.op"
        for layer in range(stride):
            places[f"up.{level}.layers.{layer}.resnet"] = f"output_blocks.{first + layer}.0"
            places[f"up.{level}.layers.{layer}.attention"] = f"output_blocks.{first + layer}.1"
        if level in slots:
            end = first + layers
            places[f"up.{level}.upsample"] = f"output_blocks.{end}.{slots[level]}.conv"
    return places


def _inside(place: str, rules: Mapping[str, Renaming]) -> Renaming:
    """The rules for what follows a place of ours."""
    return rules.get(place.rpartition(".")[2], MODULE)


def _renamed(name: str, table: Mapping[str, tuple[str, Renaming]]) -> str:
    """The other name, by the longest place that a name begins with; empty where none fits."""
    end = len(name)
    while end > 0 and name[:end] not in table:
        end = name.rfind(".", 0, end)
    if end <= 0:
        return ""
    place, rules = table[name[:end]]
    inside = translate(name[end:], rules)
    return "" if inside is None else place + inside


def _refused(names: list[str]) -> ModelError:
    return ModelError(
        f"{len(names)} tensors of its U-Net are none that eri knows, '{printable(names[0])}' first",
        hint="is it a U-Net of Stable Diffusion 1, 2 or XL?",
        problems=first_few(names),
    )

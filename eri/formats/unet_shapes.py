"""The sizes of a U-Net without a config, out of the names and shapes of its tensors.

What a family is follows from the structure and never from a width, so that a small net of the same
topology is told like a large one: transformers entered by a convolution are SD1.x (8 heads); linear
ones are SD2.x or SDXL (heads of 64), and SDXL alone has added conditions and no transformer at its
first level. What shapes cannot tell is the same in all published models.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from eri.errors import ModelError
from eri.formats.unet_config import UNetConfigFields
from eri.printable import printable

__all__ = ["fields_from_shapes", "refuse_unusable"]

Shapes = Mapping[str, tuple[int, ...]]

LAYER = re.compile(r"(down|up)\.(\d+)\.layers\.(\d+)\.resnet\.conv1\.weight")
BLOCK = re.compile(
    r"((?:down|up)\.\d+|mid)\.layers\.(\d+)\.attention\.blocks\.(\d+)\.norm1\.weight"
)

HEADS_SD1 = 8
HEAD_WIDTH = 64  # of SD2.x and SDXL
CONTEXT_SD2 = 1024
TIME_IDS = 6
TIME_ID_DIM = 256
GROUPS = 32
EPS = 1e-5
SAMPLE_SIZE = {"sd15": 64, "sd21": 96, "sdxl": 128}  # 512², 768² and 1024² pixels


def fields_from_shapes(shapes: Shapes, where: Path, *, openclip: bool) -> UNetConfigFields:
    """What the shapes tell.

    Args:
        shapes: of every tensor, by our names.
        where: the file, for errors.
        openclip: whether an OpenCLIP text encoder comes with it: SD2.x exists with convolutions
            around its transformers too, and nothing else in it tells it from SD1.x.

    Raises:
        ModelError: a tensor that every U-Net has is missing, or the U-Net is one of another kind.
    """
    down, up = _layers(shapes, "down"), _layers(shapes, "up")
    depths = _depths(shapes)
    levels = len(down)
    if not down or len(up) != levels or len(set(map(len, (*down, *(u[1:] for u in up))))) > 1:
        raise _broken("its levels do not match", where)
    channels = tuple(_shape(shapes, f"down.{n}.layers.0.resnet.conv1.weight", where)[0]
                     for n in range(levels))  # fmt: skip
    down_depths = tuple(tuple(depths[f"down.{n}", j] for j in down[n]) for n in range(levels))
    up_depths = tuple(tuple(depths[f"up.{n}", j] for j in up[n]) for n in range(levels))
    context_dim = _first(shapes, ".attn2.to_k.weight", where)[1]
    entry = _first(shapes, ".attention.proj_in.weight", where)
    attends = [
        any((*down_depths[n], *up_depths[levels - 1 - n], n == levels - 1 and depths["mid", 0]))
        for n in range(levels)
    ]
    name = "add_embedding.linear_1.weight"
    added = _shape(shapes, name, where) if name in shapes else None
    linear = len(entry) == 2 or openclip or context_dim == CONTEXT_SD2 or added is not None
    if added is not None:
        family = "sdxl"
    else:
        family = "sd21" if linear else "sd15"
    return UNetConfigFields(
        in_channels=_shape(shapes, "conv_in.weight", where)[1],
        out_channels=_shape(shapes, "conv_out.weight", where)[0],
        block_channels=channels,
        layers_per_block=len(down[0]),
        down_depths=down_depths,
        mid_depth=depths["mid", 0] or None,
        up_depths=up_depths,
        heads=_heads(channels, attends, linear, where),
        context_dim=context_dim,
        linear_projection=linear,
        norm_groups=GROUPS,
        norm_eps=EPS,
        sample_size=SAMPLE_SIZE[family],
        pooled_dim=None if added is None else added[1] - TIME_IDS * TIME_ID_DIM,
        time_id_dim=None if added is None else TIME_ID_DIM,
        upcast_attention=family == "sd21",
    )


def refuse_unusable(fields: UNetConfigFields, where: Path) -> None:
    """Refuse U-Nets of another purpose that look like one of ours, by their name.

    Raises:
        ModelError: it is the refiner of SDXL, or an SD2 unCLIP.
    """
    if fields.pooled_dim is None:
        return
    attends = [any(depths) for depths in fields.down_depths]
    if attends[0]:
        found, hint = "an SD2 unCLIP model, made to vary images", "use Stable Diffusion 2.1 itself"
    elif len(attends) == 4 and not attends[-1]:
        found, hint = "the SDXL refiner", "train on the SDXL base model"
    elif fields.pooled_dim < 1 or not attends[-1]:
        found, hint = "a U-Net of a kind that eri does not know", "SD1.x, SD2.x and SDXL are known"
    else:
        return
    raise ModelError(f"this is {found}", where=printable(where), hint=hint)


def _layers(shapes: Shapes, way: str) -> list[list[int]]:
    """The numbers of the layers of each level; empty where a level or a layer is left out."""
    found: dict[int, set[int]] = defaultdict(set)
    for match in filter(None, map(LAYER.fullmatch, shapes)):
        if match[1] == way:
            found[int(match[2])].add(int(match[3]))
    levels = [sorted(found[level]) for level in sorted(found)]
    whole = sorted(found) == list(range(len(found))) and all(
        layers == list(range(len(layers))) for layers in levels
    )
    return levels if whole else []


def _depths(shapes: Shapes) -> Mapping[tuple[str, int], int]:
    """The transformer blocks of each place (stage, layer); 0 where there is no transformer."""
    found: dict[tuple[str, int], int] = defaultdict(int)
    for match in filter(None, map(BLOCK.fullmatch, shapes)):
        place = match[1], int(match[2])
        found[place] = max(found[place], int(match[3]) + 1)
    return found


def _heads(
    channels: tuple[int, ...], attends: list[bool], linear: bool, where: Path
) -> tuple[int, ...]:
    """Attention heads of each level."""
    for width, attending in zip(channels, attends, strict=True):
        if width % GROUPS:
            raise _broken(f"a level of width {width} cannot have {GROUPS} groups", where)
        if attending and linear and width % HEAD_WIDTH:
            raise _broken(f"a transformer of width {width} cannot have its heads", where)
    return tuple(max(width // HEAD_WIDTH, 1) if linear else HEADS_SD1 for width in channels)


def _shape(shapes: Shapes, name: str, where: Path) -> tuple[int, ...]:
    shape = shapes.get(name, ())
    if len(shape) < 2 or not all(shape):
        raise _broken(f"{name} is {list(shape) if name in shapes else 'missing'}", where)
    return shape


def _first(shapes: Shapes, ending: str, where: Path) -> tuple[int, ...]:
    name = next((name for name in shapes if name.endswith(ending)), ending)
    return _shape(shapes, name, where)


def _broken(what: str, where: Path) -> ModelError:
    return ModelError(
        f"this U-Net is not whole, or of a kind that eri does not know: {what}",
        where=printable(where),
        hint="download it again; SD1.x, SD2.x and SDXL are known",
    )

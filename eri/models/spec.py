"""From a checkpoint's own numbers to the spec of its U-Net."""

from dataclasses import replace
from typing import Any

from eri.formats.parts import Family
from eri.formats.unet_config import UNetConfigFields
from eri.models.stage import UNetConfig
from eri.models.unet import UNetSpec

__all__ = ["SD15", "SD15_FIELDS", "SD21", "SD21_FIELDS", "SDXL", "SDXL_FIELDS", "build_spec"]


def build_spec(fields: UNetConfigFields) -> UNetSpec:
    """Lay out the stages of the U-Net that a config describes.

    The skip maps are followed as a stack: what the way down pushes is what the way up takes.
    """
    widths = fields.block_channels
    skips = [widths[0]]
    down = tuple(_down_stage(fields, level, skips) for level in range(len(widths)))
    mid = UNetConfig(
        in_channels=widths[-1],
        out_channels=widths[-1],
        downsample=False,
        # a resnet, or one on each side of a transformer
        **_shared(fields, -1, (0,) if fields.mid_depth is None else (fields.mid_depth, 0)),
    )
    up = tuple(
        _up_stage(fields, level, depths, skips)
        for level, depths in zip(reversed(range(len(widths))), fields.up_depths, strict=True)
    )
    return UNetSpec(
        family=_family(fields),
        in_channels=fields.in_channels,
        out_channels=fields.out_channels,
        sample_size=fields.sample_size,
        context_dim=fields.context_dim,
        down=down,
        mid=mid,
        up=up,
        pooled_dim=fields.pooled_dim,
        time_id_dim=fields.time_id_dim,
    )


def _shared(fields: UNetConfigFields, level: int, depths: tuple[int, ...]) -> dict[str, Any]:
    """What stages have in common: the sizes of their level, and how deep each transformer is."""
    return {
        "use_attention": any(depths),
        "attend": tuple(depth > 0 for depth in depths),
        "transformer_depth": depths,
        "attention_heads": fields.heads[level],
        "lora_rank": None,
        "context_dim": fields.context_dim,
        "linear_projection": fields.linear_projection,
        "temb_channels": 4 * fields.block_channels[0],
        "groups": fields.norm_groups,
        "eps": fields.norm_eps,
    }


def _down_stage(fields: UNetConfigFields, level: int, skips: list[int]) -> UNetConfig:
    widths = fields.block_channels
    halves = level < len(widths) - 1
    skips += [widths[level]] * (fields.layers_per_block + halves)
    return UNetConfig(
        in_channels=widths[max(level - 1, 0)],
        out_channels=widths[level],
        downsample=halves,
        **_shared(fields, level, fields.down_depths[level]),
    )


def _up_stage(
    fields: UNetConfigFields, level: int, depths: tuple[int, ...], skips: list[int]
) -> UNetConfig:
    widths = fields.block_channels
    return UNetConfig(
        in_channels=widths[min(level + 1, len(widths) - 1)],
        out_channels=widths[level],
        downsample=False,
        skip_channels=tuple(skips.pop() for _ in depths),
        upsample=level > 0,
        **_shared(fields, level, depths),
    )


def _family(fields: UNetConfigFields) -> Family:
    if fields.pooled_dim is not None:
        return "sdxl"
    return "sd21" if fields.linear_projection else "sd15"


SD15_FIELDS = UNetConfigFields(
    in_channels=4,
    out_channels=4,
    block_channels=(320, 640, 1280, 1280),
    layers_per_block=2,
    down_depths=((1, 1), (1, 1), (1, 1), (0, 0)),
    mid_depth=1,
    up_depths=((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    heads=(8, 8, 8, 8),
    context_dim=768,
    linear_projection=False,
    norm_groups=32,
    norm_eps=1e-5,
    sample_size=64,
    pooled_dim=None,
    time_id_dim=None,
    upcast_attention=False,
)

SD21_FIELDS = replace(
    SD15_FIELDS,
    heads=(5, 10, 20, 20),
    context_dim=1024,
    linear_projection=True,
    sample_size=96,
    upcast_attention=True,
)
SDXL_FIELDS = replace(
    SD15_FIELDS,
    block_channels=(320, 640, 1280),
    down_depths=((0, 0), (2, 2), (10, 10)),
    mid_depth=10,
    up_depths=((10, 10, 10), (2, 2, 2), (0, 0, 0)),
    heads=(5, 10, 20),
    context_dim=2048,
    linear_projection=True,
    sample_size=128,
    pooled_dim=1280,
    time_id_dim=256,
)

SD15 = build_spec(SD15_FIELDS)
"""Stable Diffusion 1.5; its module names are those of SD2.x as well."""

SD21 = build_spec(SD21_FIELDS)
"""Stable Diffusion 2.1 at 768²."""

SDXL = build_spec(SDXL_FIELDS)
"""Stable Diffusion XL base; the module names of smaller derivatives are some of its own."""

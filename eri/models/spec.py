"""From a checkpoint's own numbers to the spec of its U-Net."""

from eri.formats.diffusers_folder import UNetConfigFields
from eri.models.stage import UNetConfig
from eri.models.unet import Family, UNetSpec

__all__ = ["SD15", "build_spec"]


def build_spec(fields: UNetConfigFields) -> UNetSpec:
    """Lay out the stages of the U-Net that a config describes.

    The skip maps are followed as a stack: what the way down pushes is what the way up takes.
    """
    widths = fields.block_channels
    skips = [widths[0]]
    down = tuple(_down_stage(fields, level, skips) for level in range(len(widths)))
    middle = len(widths) - 1
    mid = UNetConfig(
        in_channels=widths[middle],
        out_channels=widths[middle],
        use_attention=True,
        downsample=False,
        attend=(True, False),
        **_shared(fields, middle),
    )
    up = tuple(_up_stage(fields, level, skips) for level in reversed(range(len(widths))))
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


def _shared(fields: UNetConfigFields, level: int) -> dict:
    """What every stage of a level has in common."""
    return {
        "attention_heads": fields.heads[level],
        "lora_rank": None,
        "transformer_depth": fields.transformer_depth[level],
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
        use_attention=fields.attention_levels[level],
        downsample=halves,
        attend=(True,) * fields.layers_per_block,
        **_shared(fields, level),
    )


def _up_stage(fields: UNetConfigFields, level: int, skips: list[int]) -> UNetConfig:
    widths = fields.block_channels
    layers = fields.layers_per_block + 1
    return UNetConfig(
        in_channels=widths[min(level + 1, len(widths) - 1)],
        out_channels=widths[level],
        use_attention=fields.attention_levels[level],
        downsample=False,
        attend=(True,) * layers,
        skip_channels=tuple(skips.pop() for _ in range(layers)),
        upsample=level > 0,
        **_shared(fields, level),
    )


def _family(fields: UNetConfigFields) -> Family:
    if fields.pooled_dim is not None:
        return "sdxl"
    return "sd21" if fields.linear_projection else "sd15"


SD15 = build_spec(
    UNetConfigFields(
        in_channels=4,
        out_channels=4,
        block_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        attention_levels=(True, True, True, False),
        transformer_depth=(1, 1, 1, 1),
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
)
"""Stable Diffusion 1.5; its module names are those of every model of its topology."""

"""The sizes of a U-Net, out of the config that diffusers writes beside its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eri.formats.foreign_config import ForeignConfig

__all__ = ["UNetConfigFields", "unet_config"]

WITH_ATTENTION = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
MID_WITH_ATTENTION = {"UNetMidBlock2DCrossAttn": True, "UNetMidBlock2D": False}
UP_NAMES = {True: "CrossAttnUpBlock2D", False: "UpBlock2D"}
TIME_IDS = 6  # original height and width, crop top and left, target height and width

FIELDS = (
    "sample_size",
    "in_channels",
    "out_channels",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "attention_head_dim",
    "cross_attention_dim",
    "use_linear_projection",
    "upcast_attention",
    "norm_num_groups",
    "norm_eps",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    "addition_embed_type_num_heads",  # of a kind of embedding that is refused
)
AVERAGING = (  # how diffusers' EMAModel averaged the weights, kept beside the U-Net's own fields
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
)
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "addition_embed_type": ("text_time",),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (False,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": tuple(MID_WITH_ATTENTION),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
}


@dataclass(frozen=True, kw_only=True)
class UNetConfigFields:
    """What a U-Net's config says; levels are counted downwards, the widest maps first.

    Attributes:
        block_channels: of each level.
        down_depths: transformer blocks behind each resnet of each level; 0: no transformer.
        mid_depth: transformer blocks in the middle; None: the middle is a single resnet.
        up_depths: as `down_depths`, in the order in which the way up runs.
        heads: attention heads of a level, which diffusers calls `attention_head_dim`.
        context_dim: C of the text states.
        linear_projection: transformers are entered and left by a linear layer, not a convolution.
        sample_size: side of the latents that the model was trained on.
        pooled_dim: of the pooled text state; None where the model takes none.
        time_id_dim: sinusoid of each of the six time ids; None where the model takes none.
    """

    in_channels: int
    out_channels: int
    block_channels: tuple[int, ...]
    layers_per_block: int
    down_depths: tuple[tuple[int, ...], ...]
    mid_depth: int | None
    up_depths: tuple[tuple[int, ...], ...]
    heads: tuple[int, ...]
    context_dim: int
    linear_projection: bool
    norm_groups: int
    norm_eps: float
    sample_size: int
    pooled_dim: int | None
    time_id_dim: int | None
    upcast_attention: bool


def unet_config(folder: Path) -> UNetConfigFields:
    """Read `config.json` in the U-Net's folder.

    Raises:
        ModelError: it is missing or damaged, or describes a network that is not supported.
    """
    config = ForeignConfig(folder / "config.json")
    config.choice("_class_name", ["UNet2DConditionModel"], default="UNet2DConditionModel")
    config.require_known(SUPPORTED, FIELDS + AVERAGING)
    down = config.words("down_block_types", list(WITH_ATTENTION))
    attention = tuple(WITH_ATTENTION[name] for name in down)
    mirrored = tuple(UP_NAMES[has] for has in reversed(attention))
    if config.words("up_block_types", list(UP_NAMES.values())) != mirrored:
        raise config.refuse("up_block_types", f"the way down mirrored, {', '.join(mirrored)}")
    levels = len(down)
    widths = config.integers("block_out_channels", count=levels, default=0, at_most=2**14)
    layers = config.integer("layers_per_block", default=2, at_most=8)
    pooled_dim, time_id_dim = _added_conditions(config)
    down_depths, mid_depth, up_depths = _depths(config, attention, layers)
    fields = UNetConfigFields(
        in_channels=config.integer("in_channels", default=4, at_most=64),
        out_channels=config.integer("out_channels", default=4, at_most=64),
        block_channels=widths,
        layers_per_block=layers,
        down_depths=down_depths,
        mid_depth=mid_depth,
        up_depths=up_depths,
        heads=config.integers("attention_head_dim", count=levels, default=8, at_most=1024),
        context_dim=config.integer("cross_attention_dim", at_most=2**14),
        linear_projection=config.flag("use_linear_projection", default=False),
        norm_groups=config.integer("norm_num_groups", default=32, at_most=2**14),
        norm_eps=config.number("norm_eps", default=1e-5, between=(0, 1)),
        sample_size=config.integer("sample_size", at_most=2**12),
        pooled_dim=pooled_dim,
        time_id_dim=time_id_dim,
        upcast_attention=config.flag("upcast_attention", default=False),
    )
    _require_division(config, fields)
    return fields


Depths = tuple[tuple[int, ...], ...]


def _depths(
    config: ForeignConfig, attention: tuple[bool, ...], layers: int
) -> tuple[Depths, int | None, Depths]:
    """How deep the transformers are on the way down, in the middle and on the way up."""
    down = config.nested("transformer_layers_per_block", (layers,) * len(attention), at_most=64)
    mid = MID_WITH_ATTENTION[
        config.choice("mid_block_type", [*MID_WITH_ATTENTION], default="UNetMidBlock2DCrossAttn")
    ]
    reverse = "reverse_transformer_layers_per_block"
    if reverse in config.values:
        up = config.nested(reverse, (layers + 1,) * len(attention), at_most=64)
    elif any(len(set(depths)) > 1 for depths in down):
        raise config.refuse(reverse, "the depths of the way up, since those of a level differ")
    else:
        up = tuple((depths[0],) * (layers + 1) for depths in reversed(down))
    return (
        tuple(d if has else (0,) * layers for d, has in zip(down, attention, strict=True)),
        down[-1][0] if mid else None,
        tuple(
            d if has else (0,) * (layers + 1)
            for d, has in zip(up, reversed(attention), strict=True)
        ),
    )


def _added_conditions(config: ForeignConfig) -> tuple[int | None, int | None]:
    """Widths of the pooled text state and of each time id, where the model takes them."""
    if "addition_embed_type" not in config.values:
        return None, None
    time_id_dim = config.integer("addition_time_embed_dim", at_most=2**12)
    both = config.integer("projection_class_embeddings_input_dim", at_most=2**16)
    if both <= TIME_IDS * time_id_dim:
        at_least = f"more than {TIME_IDS} × addition_time_embed_dim = {TIME_IDS * time_id_dim}"
        raise config.refuse("projection_class_embeddings_input_dim", at_least)
    return both - TIME_IDS * time_id_dim, time_id_dim


def _require_division(config: ForeignConfig, fields: UNetConfigFields) -> None:
    for width, heads in zip(fields.block_channels, fields.heads, strict=True):
        if width % fields.norm_groups:
            raise config.refuse("norm_num_groups", f"a divisor of every width, {width} among them")
        if width % heads:
            raise config.refuse("attention_head_dim", f"for each level a divisor of {width}")

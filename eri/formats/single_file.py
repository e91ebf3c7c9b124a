"""A whole model in one safetensors file, in the layout of CompVis and sgm, split into its parts.

    model.diffusion_model.                       U-Net
    first_stage_model.                           VAE
    cond_stage_model.transformer.                CLIP-L in transformers' names (SD1.x)
    cond_stage_model.model.                      OpenCLIP-H in its own names (SD2.x)
    conditioner.embedders.0.transformer.         CLIP-L (SDXL)
    conditioner.embedders.1.model.               OpenCLIP-bigG (SDXL)
    model_ema.                                   a second copy of the U-Net, not used

Files with one part alone lack the prefix, or have diffusers' names. Free of torch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from eri.formats.header import Header, TensorInfo, read_header
from eri.formats.tail import require_written

__all__ = ["Named", "SingleFile", "Tower", "read_single_file"]

Named = Mapping[str, tuple[str, TensorInfo]]
"""Tensors of a part: the name without its prefix, to the name in the file and its shape."""

PartName = Literal["unet", "vae", "text 1", "text 2"]

PREFIXES: tuple[tuple[str, PartName], ...] = (
    ("model.diffusion_model.", "unet"),
    ("first_stage_model.", "vae"),
    ("cond_stage_model.transformer.", "text 1"),
    ("cond_stage_model.model.", "text 1"),
    ("conditioner.embedders.0.transformer.", "text 1"),
    ("conditioner.embedders.0.model.", "text 1"),
    ("conditioner.embedders.1.model.", "text 2"),
    ("diffusion_model.", "unet"),
    ("unet.", "unet"),
    ("vae.", "vae"),
)
LONE_PARTS: tuple[tuple[re.Pattern[str], PartName], ...] = (  # of files with one part alone
    (re.compile(r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\."), "unet"),
    (
        re.compile(
            r"(conv_in|conv_out|conv_norm_out|time_embedding|add_embedding|"
            r"(down|up)_blocks\.\d+\.(resnets|attentions|downsamplers|upsamplers)|mid_block)\."
        ),
        "unet",
    ),
    (re.compile(r"(encoder|decoder|quant_conv|post_quant_conv)\."), "vae"),
    (re.compile(r"(text_model|text_projection)\."), "text 1"),
)
EMA = "model_ema."
LOOSE = re.compile(
    r"(model\.)?(betas|alphas_cumprod\w*|(sqrt|log)_\w+|posterior_\w+|logvar|lvlb_weights|"
    r"v_pred|ztsnr|edm_\w+(\.sigma_\w+)?|denoiser\.sigmas|scale_factor)"
    r"|.*\.(logit_scale|position_ids)"
)
"""Tensors that belong to no part and change nothing."""


@dataclass(frozen=True)
class Tower:
    """The tensors of one text encoder, and in whose names they are."""

    names: Named
    naming: Literal["transformers", "openclip"]


@dataclass(frozen=True)
class SingleFile:
    """The parts of one file; empty where it does not hold one.

    Attributes:
        unet: its tensors without prefix.
        vae: its tensors without prefix.
        text: its text encoders, CLIP-L first.
        ema: how many tensors of an averaged copy it holds besides.
        unused: names that belong to no part and are none of the known loose ones.
    """

    path: Path
    header: Header
    unet: Named = field(default_factory=dict)
    vae: Named = field(default_factory=dict)
    text: tuple[Tower, ...] = ()
    ema: int = 0
    unused: tuple[str, ...] = ()

    @cached_property
    def unet_naming(self) -> Literal["compvis", "diffusers"]:
        """Whose names the U-Net has."""
        return "compvis" if any(n.startswith("input_blocks.") for n in self.unet) else "diffusers"


def read_single_file(path: Path) -> SingleFile:
    """Read a file's header and sort its tensors.

    Raises:
        ModelError: it is missing, damaged or no safetensors file, or ends in zeros.
        DiskError: it may not be read.
    """
    header = read_header(path)
    require_written(path, header)
    parts: dict[PartName, dict[str, tuple[str, TensorInfo]]] = {
        "unet": {}, "vae": {}, "text 1": {}, "text 2": {},
    }  # fmt: skip
    prefixed = any(name.startswith(prefix) for name in header.tensors for prefix, _ in PREFIXES)
    ema, unused = 0, []
    for name, info in header.tensors.items():
        if name.startswith(EMA):
            ema += 1
        elif found := _place(name, prefixed):
            part, short = found
            parts[part][short] = (name, info)
        elif not LOOSE.fullmatch(name):
            unused.append(name)
    return SingleFile(
        path=path,
        header=header,
        unet=parts["unet"],
        vae=parts["vae"],
        text=tuple(_tower(parts[p]) for p in ("text 1", "text 2") if parts[p]),
        ema=ema,
        unused=tuple(unused),
    )


def _place(name: str, prefixed: bool) -> tuple[PartName, str] | None:
    if LOOSE.fullmatch(name):
        return None
    for prefix, part in PREFIXES:
        if name.startswith(prefix):
            return part, name.removeprefix(prefix)
    if prefixed:
        return None
    return next(((part, name) for pattern, part in LONE_PARTS if pattern.match(name)), None)


def _tower(names: Named) -> Tower:
    openclip = any(name.startswith("transformer.resblocks.") for name in names)
    return Tower(names, "openclip" if openclip else "transformers")

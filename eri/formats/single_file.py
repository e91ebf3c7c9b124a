"""A whole model in one safetensors file, in the layout of CompVis and sgm, split into its parts.

    model.diffusion_model.                       U-Net
    first_stage_model.                           VAE
    conditioner.embedders.0.transformer.         CLIP-L (SDXL)
    conditioner.embedders.1.model.               OpenCLIP-bigG (SDXL)
    conditioner.embedders.0.model.               OpenCLIP-H in its own names (SD-Turbo)
    cond_stage_model.transformer.                CLIP-L in transformers' names (SD1.x)
    cond_stage_model.model.                      OpenCLIP-H in its own names (SD2.x)
    model_ema.                                   a second copy of the U-Net, not used

Files with one part alone may lack the prefix, or have diffusers' names. Free of torch.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from eri.formats.header import Header, TensorInfo, read_header
from eri.formats.tail import require_written

__all__ = ["Named", "SingleFile", "Tower", "read_single_file", "sort_tensors"]

Named = Mapping[str, tuple[str, TensorInfo]]
"""Tensors of a part: the name without its prefix, to the name in the file and its shape."""

PartName = Literal["unet", "vae", "text 1", "text 2"]

# Of several prefixes of one part the first that a file has is that part's; the others are unused.
PREFIXES: tuple[tuple[str, PartName], ...] = (
    ("model.diffusion_model.", "unet"),
    ("diffusion_model.", "unet"),
    ("unet.", "unet"),
    ("first_stage_model.", "vae"),
    ("vae.", "vae"),
    ("conditioner.embedders.0.transformer.", "text 1"),
    ("conditioner.embedders.0.model.", "text 1"),
    ("cond_stage_model.transformer.", "text 1"),
    ("cond_stage_model.model.", "text 1"),
    ("conditioner.embedders.1.model.", "text 2"),
)
LONE_PARTS: tuple[tuple[re.Pattern[str], PartName], ...] = (  # of files with one part alone
    (re.compile(r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\."), "unet"),
    (
        re.compile(
            r"(conv_in|conv_out|conv_norm_out|(time|add|class)_embedding|encoder_hid_proj|"
            r"position_net|transformer_in|(down|up)_blocks|mid_block)\."
        ),
        "unet",
    ),
    (
        re.compile(
            r"text_model\.|text_projection(\.|$)|"
            r"(embeddings|encoder\.layers\.\d+\.(self_attn|layer_norm[12]|mlp)|final_layer_norm)\."
            r"|positional_embedding$|(token_embedding|transformer\.resblocks|ln_final)\."
        ),
        "text 1",
    ),
    (re.compile(r"(encoder|decoder|quant_conv|post_quant_conv)\."), "vae"),
)
ENTRIES = {"input_blocks.0.0.weight", "conv_in.weight"}
EXITS = {"out.2.weight", "conv_out.weight"}
EMA = "model_ema."
LOOSE = re.compile(
    r"(model\.)?(betas|alphas_cumprod\w*|(sqrt|log)_\w+|posterior_\w+|logvar|lvlb_weights|"
    r"v_pred|ztsnr|edm_\w+(\.sigma_\w+)?|denoiser\.sigmas|scale_factor)"
    r"|(.*\.)?(logit_scale|position_ids)"
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

    @property
    def has_unet(self) -> bool:
        """Whether a U-Net begins and ends in it; other nets share some of a U-Net's names."""
        return not ENTRIES.isdisjoint(self.unet) and not EXITS.isdisjoint(self.unet)


def read_single_file(path: Path) -> SingleFile:
    """Read a file's header and sort its tensors.

    Raises:
        ModelError: it is missing, damaged or no safetensors file, or ends in zeros.
        DiskError: it may not be read.
    """
    header = read_header(path)
    require_written(path, header)
    return sort_tensors(path, header)


def sort_tensors(path: Path, header: Header) -> SingleFile:
    """Which part of a model each tensor of a file belongs to, by its name."""
    prefixes = _prefixes(header.tensors)
    parts: dict[PartName, dict[str, tuple[str, TensorInfo]]] = {
        "unet": {}, "vae": {}, "text 1": {}, "text 2": {},
    }  # fmt: skip
    ema, unused = 0, []
    for name, info in header.tensors.items():
        if name.startswith(EMA):
            ema += 1
        elif LOOSE.fullmatch(name):
            continue
        elif found := _place(name, prefixes):
            part, short = found
            parts[part][short] = (name, info)
        else:
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


def _prefixes(names: Iterable[str]) -> dict[PartName, str]:
    """The prefix of each part that has one."""
    names = list(names)
    found: dict[PartName, str] = {}
    for prefix, part in PREFIXES:
        if part not in found and any(name.startswith(prefix) for name in names):
            found[part] = prefix
    return found


def _place(name: str, prefixes: Mapping[PartName, str]) -> tuple[PartName, str] | None:
    """The part that a tensor belongs to, and its name there."""
    if not prefixes:
        return next(((part, name) for pattern, part in LONE_PARTS if pattern.match(name)), None)
    for part, prefix in prefixes.items():
        if name.startswith(prefix):
            return part, name.removeprefix(prefix)
    return None


def _tower(names: Named) -> Tower:
    openclip = any(name.startswith("transformer.resblocks.") for name in names)
    return Tower(names, "openclip" if openclip else "transformers")

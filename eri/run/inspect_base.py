"""`eri inspect` of a base model, or of a file or folder with some of its parts.

What is told comes from headers and configs; of the weights only the hashes are worked out.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from eri.errors import ModelError
from eri.files import sha256
from eri.formats import diffusers_folder
from eri.formats.checkpoint import VAE_SCALES, text_parts, unet_part, vae_part
from eri.formats.foreign import refusal
from eri.formats.parts import Parts, Piece, TextPart, UNetPart, VAEPart
from eri.formats.single_file import SingleFile
from eri.formats.strict_json import read_object
from eri.formats.tail import require_written
from eri.formats.unet_config import UNetConfigFields
from eri.models.load import require_fit
from eri.models.spec import SD15_FIELDS, SD21_FIELDS, SDXL_FIELDS, build_spec
from eri.models.unet import UNet
from eri.printable import printable
from eri.run.base import PURPOSES, BaseFacts, find_base

__all__ = ["base_in_file", "base_in_folder"]

Facts = dict[str, Any]

UNKNOWN = "not told by the file"
METADATA_SHOWN = 30  # entries of a header's metadata
NAMES_SHOWN = 5
SSD_1B = replace(
    SDXL_FIELDS,
    down_depths=((0, 0), (2, 2), (4, 4)),
    mid_depth=None,
    up_depths=((4, 4, 10), (2, 1, 1), (0, 0, 0)),
)
VEGA = replace(
    SDXL_FIELDS,
    down_depths=((0, 0), (1, 1), (2, 2)),
    mid_depth=None,
    up_depths=((2, 2, 2), (1, 1, 1), (0, 0, 0)),
)
PUBLISHED = {
    "Stable Diffusion 1.x": SD15_FIELDS,
    "Stable Diffusion 2.x": SD21_FIELDS,
    "Stable Diffusion XL": SDXL_FIELDS,
    "Segmind SSD-1B": SSD_1B,
    "Segmind Vega": VEGA,
}
"""U-Nets by their names; fine-tunes of one are built like it."""
ENCODERS = {768: "CLIP-L", 1024: "OpenCLIP-H", 1280: "OpenCLIP-bigG"}


def base_in_file(file: SingleFile) -> Facts:
    """What a file holds that is no adapter.

    Raises:
        ModelError: it is damaged, or neither a base model nor a part of one.
    """
    path = file.path
    require_written(path, file.header)
    if file.unet:
        facts = _whole(find_base(str(path)))
    elif file.vae or file.text:
        found = Parts(
            vae=vae_part(path) if file.vae else None,
            text=text_parts(path) if file.text else (),
        )
        facts = _lone(found, path)
    else:
        raise refusal(path, file.header.tensors, "a base model, a part of one, or an adapter")
    extra = {
        "tensors of an averaged copy (EMA)": file.ema,
        "unused tensors": len(file.unused),
        "first unused tensors": [printable(name) for name in file.unused[:NAMES_SHOWN]],
        "metadata": _metadata(file.header.metadata),
    }
    return facts | {name: value for name, value in extra.items() if value}


def base_in_folder(path: Path) -> Facts:
    """What a folder of diffusers holds: a whole model, or one part.

    Raises:
        ModelError: it is damaged, or something else.
    """
    if str(path) == "demo" or diffusers_folder.is_folder(path):
        return _whole(find_base(str(path)))
    config = read_object(path / "config.json")
    kind = str(config.get("_class_name") or config.get("model_type"))
    if kind == "UNet2DConditionModel":
        found = Parts(unet=unet_part(path))
    elif kind == "AutoencoderKL":
        found = Parts(vae=vae_part(path))
    elif kind == "clip_text_model":
        found = Parts(text=text_parts(path))
    else:
        raise ModelError(
            f"this is the folder of a {printable(kind)}, which is no part of a model that eri "
            "trains",
            where=printable(path),
            hint="a U-Net, a VAE or a CLIP text encoder can be looked at, or a whole model",
        )
    return _lone(found, path)


def _whole(base: BaseFacts) -> Facts:
    """A model with a U-Net."""
    lacks = [f"{what}; {hint}" for what, hint in base.lacks]
    return {
        "kind": "base model" if base.vae or base.text else "U-Net",
        "path": printable(base.path),
        **_unet(base.unet, base.path),
        "resolution": base.resolution,
        **_prediction(base),
        **_vae(base.vae),
        **_common(base.parts, base.path),
        "to train with it": lacks or "nothing is missing",
    }


def _lone(found: Parts, path: Path) -> Facts:
    """Parts that no U-Net of a whole model comes with."""
    kinds = {"U-Net": found.unet, "VAE": found.vae, "text encoder": found.text}
    use = {
        "U-Net": "name the folder above this one in model:",
        "VAE": "name it in model.vae, beside a model of its family",
        "text encoder": "name it in model.text, beside a model of its family",
    }
    there = [kind for kind, part in kinds.items() if part]
    return {
        "kind": " and ".join(there),
        "path": printable(path),
        **({} if found.unet is None else _unet(found.unet, path)),
        **_vae(found.vae),
        **_common(found, path),
        "to train with it": [use[kind] for kind in there],
    }


def _unet(unet: UNetPart, path: Path) -> Facts:
    """Its structure, and that its tensors are those of such a net."""
    fields = unet.fields
    spec = build_spec(fields)
    with torch.device("meta"):
        require_fit(UNet(spec), unet.pieces, path)
    purpose = "latents" if fields.in_channels == 4 else PURPOSES.get(fields.in_channels, "unknown")
    return {
        "family": spec.family,
        "structure": _structure(fields),
        "layout": "single file" if path.is_file() else "folder",
        "names": unet.naming,
        "input": f"{purpose}, {fields.in_channels} channels",
        "context width": fields.context_dim,
    }


def _structure(fields: UNetConfigFields) -> str:
    """The published U-Net that is as wide and as deep."""
    alike = (name for name, known in PUBLISHED.items() if _sizes(known) == _sizes(fields))
    return next(alike, "none of the published ones")


def _sizes(fields: UNetConfigFields) -> tuple[object, ...]:
    depths = fields.down_depths, fields.mid_depth, fields.up_depths
    return fields.block_channels, *depths, fields.context_dim


def _prediction(base: BaseFacts) -> Facts:
    if base.hint is None:
        measured = f"{UNKNOWN}; measured before training"
        return {"prediction": measured, "zero terminal SNR": measured}
    zero = base.hint.zero_terminal_snr
    return {
        "prediction": base.hint.prediction,
        "zero terminal SNR": f"{UNKNOWN}; measured before training" if zero is None else zero,
        "told by": base.hint.why,
    }


def _vae(vae: VAEPart | None) -> Facts:
    if vae is None:
        return {}
    sd, sdxl = VAE_SCALES["sd15"], VAE_SCALES["sdxl"]
    unknown = f"{UNKNOWN}; {sd} in SD1.x and SD2.x, {sdxl} in SDXL"
    return {"VAE scale": vae.config.get("scaling_factor", unknown)}


def _common(found: Parts, path: Path) -> Facts:
    """What is told of every part."""
    files = {file for files in found.files.values() for file in files}
    facts: Facts = {
        "parts": list(found.pieces),
        "parameters": found.parameters | {"all": sum(found.parameters.values())},
        "dtype": {part: _dtypes(pieces.values()) for part, pieces in found.pieces.items()},
        "SHA-256": {_shown(file, path): sha256(file) for file in sorted(files)},
    }
    if found.text:
        facts["text encoders"] = [_encoder(part) for part in found.text]
    return facts


def _dtypes(pieces: Iterable[Piece]) -> str | dict[str, int]:
    """The type of all tensors, else each with how many have it."""
    stored = {(piece.file, piece.key): piece.dtype for piece in pieces}
    counts = Counter(stored.values()).most_common()
    return counts[0][0] if len(counts) == 1 else dict(counts)


def _encoder(part: TextPart) -> str:
    width, layers = part.config["hidden_size"], part.config["num_hidden_layers"]
    name = ENCODERS.get(width, "CLIP")
    return f"{name}: {layers} layers, {width} wide, {part.config['hidden_act']}"


def _shown(file: Path, path: Path) -> str:
    inside = file.is_relative_to(path) and file != path
    return printable(file.relative_to(path) if inside else file.name)


def _metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """The first entries of a header's text, each fit to print."""
    shown = list(metadata.items())[:METADATA_SHOWN]
    found = {printable(key, limit=80): printable(value) for key, value in shown}
    left_out = len(metadata) - len(shown)
    return found | ({"…": f"and {left_out} more"} if left_out else {})

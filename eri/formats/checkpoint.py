"""A base model on the disk, in whatever layout: its parts, found without reading a weight.

A folder of diffusers, one of its part folders, a whole model in one file, or a file with one part
alone. What is something else is refused by its name. Free of torch.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eri.errors import ModelError
from eri.formats import compvis_unet, diffusers_folder, text_names, unet_names, vae_names
from eri.formats.foreign import foreign_kind, refusal
from eri.formats.header import TensorInfo
from eri.formats.parts import Family, Piece, Pieces, TextPart, UNetPart, VAEPart
from eri.formats.single_file import SingleFile, read_single_file
from eri.formats.unet_config import UNetConfigFields
from eri.formats.unet_shapes import fields_from_shapes, refuse_unusable
from eri.printable import first_few, printable

__all__ = ["VAE_SCALES", "text_parts", "unet_part", "vae_part"]

VAE_SCALES: Mapping[Family, float] = {"sd15": 0.18215, "sd21": 0.18215, "sdxl": 0.13025}
"""What latents are multiplied by, where no config tells it."""

A_MODEL = "a model that eri trains"
A_VAE = "a VAE that eri reads"
A_TEXT_ENCODER = "a text encoder that eri reads"
VAE_GROUPS = 32
LATENT_CHANNELS = 4


def unet_part(path: Path) -> UNetPart:
    """The U-Net of a model.

    Args:
        path: a diffusers folder or its `unet` folder, or a safetensors file.

    Raises:
        ModelError: it is missing, damaged, or something else, which is named.
        DiskError: it may not be read.
    """
    if path.is_file():
        return _unet_in_file(read_single_file(path))
    folder = diffusers_folder.component(path, "unet")
    fields = diffusers_folder.unet_config(folder)
    refuse_unusable(fields, folder)
    named = diffusers_folder.stored_tensors(folder)
    ours = _from_diffusers(named, folder)
    return UNetPart(pieces=_renamed(named, ours), fields=fields, naming="diffusers")


def vae_part(path: Path, family: Family | None = None) -> VAEPart | None:
    """The autoencoder of a model.

    Args:
        path: a diffusers folder or its `vae` folder, or a safetensors file.
        family: of the U-Net, which tells the scale of the latents where no config does.

    Returns:
        The part; None where the model has none.

    Raises:
        ModelError: it is missing, damaged, or something else.
        DiskError: it may not be read.
    """
    if path.is_file():
        return _vae_in_file(read_single_file(path), family)
    if diffusers_folder.is_folder(path) and not (path / "vae").is_dir():
        return None
    folder = diffusers_folder.component(path, "vae")
    config = diffusers_folder.vae_config(folder)
    named = diffusers_folder.stored_tensors(folder)
    return VAEPart(pieces=_renamed(named, {n: vae_names.current(n) for n in named}), config=config)


def text_parts(path: Path) -> tuple[TextPart, ...]:
    """The text encoders of a model: none, CLIP-L or OpenCLIP-H, or CLIP-L and OpenCLIP-bigG.

    Raises:
        ModelError: one is damaged or something else.
        DiskError: it may not be read.
    """
    if not path.is_file():
        return text_names.folder_parts(path)
    file = read_single_file(path)
    if not file.text and not file.has_unet:
        names = file.header.tensors
        if foreign_kind(names) is not None or not file.vae:
            raise refusal(path, names, A_TEXT_ENCODER)
    alone = len(file.text) == 1
    return tuple(
        # SD2 was trained on the last state but one, so its files' last block is not used
        text_names.openclip_part(path, tower.names, penultimate=alone)
        if tower.naming == "openclip"
        else text_names.hf_part(path, tower.names)
        for tower in file.text
    )


def _unet_in_file(file: SingleFile) -> UNetPart:
    if not file.unet or foreign_kind(_telling(file)) is not None:
        raise _not_a_unet(file)
    if file.unet_naming == "compvis":
        try:
            ours = compvis_unet.from_compvis(file.unet)
        except ModelError as error:
            raise _located(error, file.path) from error
    else:
        ours = _from_diffusers(file.unet, file.path)
    pieces = _renamed(
        {short: (file.path, key, info) for short, (key, info) in file.unet.items()}, ours
    )
    return UNetPart(pieces=pieces, fields=_fields(file, pieces), naming=file.unet_naming)


def _fields(file: SingleFile, pieces: Pieces) -> UNetConfigFields:
    """The sizes, out of the config beside a file of diffusers', else out of the shapes."""
    beside = file.path.parent / "config.json"
    if file.unet_naming == "diffusers" and beside.is_file():
        fields = diffusers_folder.unet_config(file.path.parent)
    else:
        shapes = {name: piece.shape for name, piece in pieces.items()}
        openclip = any(tower.naming == "openclip" for tower in file.text)
        fields = fields_from_shapes(shapes, file.path, openclip=openclip)
    refuse_unusable(fields, file.path)
    return fields


def _telling(file: SingleFile) -> Iterable[str]:
    """The names that tell what a file is.

    Where a U-Net begins and ends those are its own: what else lies in the file is not used.
    """
    return file.unet if file.has_unet else file.header.tensors


def _not_a_unet(file: SingleFile) -> ModelError:
    """What a file without a usable U-Net is."""
    if foreign_kind(_telling(file)) is None and (file.vae or file.text):
        found = "a VAE" if file.vae else "a text encoder"
        found = "a VAE and text encoders without a U-Net" if file.vae and file.text else found
        key = "model.vae" if file.vae else "model.text"
        return ModelError(
            f"this is {found}, not {A_MODEL}",
            where=printable(file.path),
            hint=f"set model.path to a whole model or to a U-Net, and {key} to this file",
        )
    return refusal(file.path, _telling(file), A_MODEL)


def _vae_in_file(file: SingleFile, family: Family | None) -> VAEPart | None:
    telling = file.vae if file.has_unet else file.header.tensors
    if foreign_kind(telling) is not None or not (file.unet or file.vae or file.text):
        raise refusal(file.path, telling, A_VAE)
    if not file.vae:
        return None
    if vae_names.is_compvis(file.vae):
        try:
            names = vae_names.from_compvis(file.vae)
        except ModelError as error:
            raise _located(error, file.path) from error
    else:
        names = {name: vae_names.current(name) for name in file.vae}
    pieces = _renamed(
        {short: (file.path, key, info) for short, (key, info) in file.vae.items()}, names
    )
    return VAEPart(pieces=pieces, config=_vae_config(file, pieces, family))


def _vae_config(file: SingleFile, pieces: Pieces, family: Family | None) -> dict[str, Any]:
    """Arguments for diffusers' `AutoencoderKL`, out of the shapes."""
    if not vae_names.is_compvis(file.vae) and (file.path.parent / "config.json").is_file():
        return diffusers_folder.vae_config(file.path.parent)
    widths = []
    while first := pieces.get(f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight"):
        widths.append(first.shape[0])
    layers = sum(
        name.startswith("encoder.down_blocks.0.resnets.") and name.endswith(".conv1.weight")
        for name in pieces
    )
    entry = pieces.get("decoder.conv_in.weight")
    if not widths or entry is None or len(entry.shape) < 2 or widths[0] % VAE_GROUPS:
        raise ModelError(
            "this autoencoder is not whole, or of a kind that eri does not know",
            where=printable(file.path),
            hint="the VAEs of SD1.x, SD2.x and SDXL are known",
        )
    if entry.shape[1] != LATENT_CHANNELS:
        raise ModelError(
            f"this VAE makes latents of {entry.shape[1]} channels, as those of SD3 and Flux do; "
            f"SD1.x, SD2.x and SDXL have {LATENT_CHANNELS}",
            where=printable(file.path),
            hint="use the VAE of the model's family",
        )
    return {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "block_out_channels": tuple(widths),
        "norm_num_groups": VAE_GROUPS,
        "layers_per_block": layers,
        "latent_channels": LATENT_CHANNELS,
        **({} if family is None else {"scaling_factor": VAE_SCALES[family]}),
    }


def _renamed(
    named: Mapping[str, tuple[Path, str, TensorInfo]], names: Mapping[str, str]
) -> dict[str, Piece]:
    return {
        names[name]: Piece(file=file, key=key, dtype=info.dtype, shape=info.shape)
        for name, (file, key, info) in named.items()
    }


def _from_diffusers(names: Iterable[str], where: Path) -> dict[str, str]:
    """Our name of each of diffusers' names; those that no U-Net has are refused together."""
    found, unknown = {}, []
    for name in names:
        try:
            found[name] = unet_names.from_diffusers(name)
        except ModelError:
            unknown.append(name)
    if unknown:
        raise ModelError(
            f"{len(unknown)} tensors belong to no U-Net that eri knows",
            where=printable(where),
            hint="only U-Net models of Stable Diffusion 1, 2 and XL are supported",
            problems=first_few(unknown),
        )
    return found


def _located(error: ModelError, path: Path) -> ModelError:
    """The same error, saying which file it is about and, if it says nothing, what to do."""
    hint = error.hint or "the file may be damaged: download it again, or use another version"
    return ModelError(error.what, where=printable(path), hint=hint, problems=error.problems)

"""The parts of a base model as they lie on the disk, in whatever layout: where each tensor is.

A part names every tensor once, in one way for all layouts: the U-Net in our names, the VAE in those
of diffusers, a text encoder in those of transformers without the leading `text_model.`. Free of
torch: nothing is read here but headers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eri.formats.unet_config import UNetConfigFields

__all__ = ["Family", "Parts", "Piece", "Pieces", "TextPart", "UNetPart", "VAEPart"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Where one tensor lies, and how it is read.

    Attributes:
        file: a safetensors file.
        key: its name in the file.
        dtype: as the file spells it.
        shape: of the tensor once it is read, after `rows` and `transposed`.
        rows: the first and the last but one row of the stored tensor that it is; None: all.
        transposed: whether its two sides are then swapped.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    transposed: bool = False


Family = Literal["sd15", "sd21", "sdxl"]
"""Of a U-Net: SD1.x, SD2.x, or SDXL with the shallower nets made from it."""

TEXT_NAMES = ("text_encoder", "text_encoder_2")

Pieces = Mapping[str, Piece]
"""A part's tensors by name."""


@dataclass(frozen=True, kw_only=True)
class UNetPart:
    """A U-Net.

    Attributes:
        pieces: by our names.
        fields: its sizes, from its config or, where there is none, from its shapes.
        naming: whose names the file has: `diffusers` or `compvis`.
    """

    pieces: Pieces
    fields: UNetConfigFields
    naming: str


@dataclass(frozen=True, kw_only=True)
class VAEPart:
    """An autoencoder.

    Attributes:
        pieces: by diffusers' names.
        config: arguments for diffusers' `AutoencoderKL`; without `scaling_factor` where the file
            does not tell it.
    """

    pieces: Pieces
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """A CLIP text encoder.

    Attributes:
        pieces: by transformers' names without `text_model.`; a projected encoder has
            `text_projection.weight` too, `[P, W]`.
        config: arguments for transformers' `CLIPTextConfig`.
        tokenizer: the folder of its own tokenizer; None: CLIP's vocabulary, which comes with eri.
        pad: the token that fills a prompt up, where the tokenizer is CLIP's.
    """

    pieces: Pieces
    config: dict[str, Any]
    tokenizer: Path | None
    pad: int


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts that a model has; each has its tensors and files under diffusers' name of it."""

    unet: UNetPart | None = None
    vae: VAEPart | None = None
    text: tuple[TextPart, ...] = ()

    @property
    def pieces(self) -> dict[str, Pieces]:
        """The tensors of each part."""
        parts: list[tuple[str, UNetPart | VAEPart | TextPart | None]] = [
            ("unet", self.unet),
            ("vae", self.vae),
            *zip(TEXT_NAMES, self.text, strict=False),
        ]
        return {name: part.pieces for name, part in parts if part is not None}

    @property
    def files(self) -> dict[str, list[Path]]:
        """The weight files of each part."""
        return {
            part: sorted({piece.file for piece in pieces.values()})
            for part, pieces in self.pieces.items()
        }

    @property
    def parameters(self) -> dict[str, int]:
        """The numbers of each part."""
        return {
            part: sum(math.prod(piece.shape) for piece in pieces.values())
            for part, pieces in self.pieces.items()
        }

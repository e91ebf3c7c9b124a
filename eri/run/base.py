"""The base model of a run: where it is, whether it can be used, and its parts."""

import hashlib
import importlib.resources
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from eri.config import ModelSource
from eri.errors import ModelError
from eri.files import sha256
from eri.formats import diffusers_folder
from eri.formats.checkpoint import text_parts, unet_part, vae_part
from eri.formats.parts import TEXT_NAMES, Parts, TextPart, UNetPart, VAEPart
from eri.formats.prediction_hints import Hint, file_hint, folder_hint
from eri.formats.single_file import read_single_file
from eri.models.load import load_unet, require_fit
from eri.models.spec import build_spec
from eri.models.text import TextEncoder, load_text
from eri.models.unet import UNet, UNetSpec
from eri.models.vae import VAE, load_vae
from eri.models.words import Words, load_words
from eri.printable import printable
from eri.run import hub
from eri.run.file_hashes import sha256_of

__all__ = ["BaseFacts", "find_base", "look_at"]

PURPOSES = {8: "editing by instruction (pix2pix)", 9: "inpainting", 5: "depth maps", 7: "upscaling"}
"""What a U-Net is for that takes more than a latent's 4 channels."""

LATENT_CHANNELS = 4


@dataclass(frozen=True)
class BaseFacts:
    """What a base model's configs and headers say, before any weight is read."""

    source: ModelSource
    path: Path
    name: str  # of the model, without its path
    unet: UNetPart
    vae: VAEPart | None
    text: tuple[TextPart, ...]
    spec: UNetSpec
    noise: diffusers_folder.NoiseConfig
    hint: Hint | None  # what the files say of the prediction
    notes: tuple[str, ...]  # what its owner may want to know

    @property
    def vae_path(self) -> Path:
        """Where the VAE is."""
        return self.path if self.source.vae is None else Path(self.source.vae)

    @property
    def text_path(self) -> Path:
        """Where the text encoders are."""
        return self.path if self.source.text is None else Path(self.source.text)

    @property
    def latent_factor(self) -> int:
        """Pixels that a latent pixel stands for, along each side."""
        levels = 4 if self.vae is None else len(self.vae.config["block_out_channels"])
        return 2 ** (levels - 1)

    @property
    def resolution(self) -> int:
        """Side in pixels of the images that the U-Net was trained on."""
        return self.spec.sample_size * self.latent_factor

    @property
    def step(self) -> int:
        """What every side of an image is a multiple of, in pixels, so that the U-Net can halve."""
        return self.spec.divisor * self.latent_factor

    @property
    def parts(self) -> Parts:
        """What there is of U-Net, VAE and text encoders."""
        return Parts(unet=self.unet, vae=self.vae, text=self.text)

    @cached_property
    def weights(self) -> dict[str, str]:
        """SHA-256 of each part's files, worked out when asked for: it is slow for a new model."""
        files_of = self.parts.files
        every = {file for files in files_of.values() for file in files}
        digests = {file: sha256_of(file) for file in every}
        return {part: "+".join(digests[f] for f in files) for part, files in files_of.items()}

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of all that each part computes from: weights, config and tokenizer."""
        made_from: dict[str, list[object]] = {part: [hash_] for part, hash_ in self.weights.items()}
        made_from["unet"].append(repr(self.spec))
        if self.vae is not None:
            made_from["vae"].append(self.vae.config)
        for name, part in zip(TEXT_NAMES, self.text, strict=False):
            made_from[name] += [part.config, part.pad, _tokenizer_hashes(part)]
        return {
            part: hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
            for part, what in made_from.items()
        }

    @cached_property
    def words(self) -> Words:
        """How the text encoders read prompts; that their weights fit is checked, too."""
        source = self.source
        return load_words(self.text_path, clip_skip=source.clip_skip, joined=source.windows)

    @cached_property
    def lacks(self) -> tuple[tuple[str, str], ...]:
        """What is missing to train with it or to draw: a line and a hint for each."""
        return tuple(_lacks(self))

    def load_unet(self, *, dtype: torch.dtype, device: torch.device) -> UNet:
        """The U-Net, frozen."""
        return load_unet(self.path, dtype=dtype, device=device)

    def load_vae(self) -> VAE:
        """The VAE, in float32 on the CPU."""
        return load_vae(self.vae_path, family=self.spec.family)

    def load_text(self, device: torch.device | str) -> TextEncoder:
        """The text encoders, in float32."""
        return load_text(
            self.text_path,
            device=device,
            clip_skip=self.source.clip_skip,
            joined=self.source.windows,
        )


Say = Callable[[str], None]
"""Called with single lines for people."""


def _silent(line: str) -> None:
    """Nobody listens."""


def look_at(model: ModelSource | str, say: Say = _silent) -> BaseFacts:
    """Find a base model that can be trained and drawn with.

    Args:
        model: `demo`, a path, a hub id, or a config's `model`.
        say: told what is downloaded.

    Raises:
        ModelError: it is missing, not supported, damaged, or lacks a part.
    """
    facts = find_base(model, say)
    if facts.lacks:
        what, hint = facts.lacks[0]
        raise ModelError(
            what,
            where=printable(facts.path),
            hint=hint,
            problems=[f"{line}: {hint}" for line, hint in facts.lacks[1:]],
        )
    with torch.device("meta"):
        require_fit(UNet(facts.spec), facts.unet.pieces, facts.path)
    return facts


def find_base(model: ModelSource | str, say: Say = _silent) -> BaseFacts:
    """Find a base model, whole or not, and read what can be read without its weights.

    Args:
        model: `demo`, a path, a hub id, or a config's `model`.
        say: told what is downloaded.

    Raises:
        ModelError: it is missing, not supported or damaged.
    """
    source = ModelSource(path=model) if isinstance(model, str) else model
    path, name = _find(source.path, say)
    unet = unet_part(path)
    spec = build_spec(unet.fields)
    noise, hint, notes = _in_file(path) if path.is_file() else _in_folder(path)
    return BaseFacts(
        source=source,
        path=path,
        name=name,
        unet=unet,
        vae=vae_part(_other(source.vae, path), spec.family),
        text=text_parts(_other(source.text, path)),
        spec=spec,
        noise=noise,
        hint=hint,
        notes=(*notes, *_unusual_types(unet)),
    )


def _tokenizer_hashes(part: TextPart) -> list[tuple[str, str]]:
    """The files of a folder's own tokenizer; CLIP's, which comes along, never changes."""
    if part.tokenizer is None:
        return []
    files = sorted(path for path in part.tokenizer.iterdir() if path.suffix in {".json", ".txt"})
    return [(path.name, sha256(path)) for path in files]


def _find(model: str, say: Say) -> tuple[Path, str]:
    """Where a model is, and its name."""
    if model == "demo":
        return Path(str(importlib.resources.files("eri") / "demo" / "model")), model
    path = Path(model).expanduser()
    if path.is_file() or (path.is_dir() and diffusers_folder.is_folder(path)):
        return path, path.absolute().name
    if path.is_dir():
        raise ModelError(
            "this folder is not a diffusers model: it has no model_index.json",
            where=printable(path),
            hint="point model: at the folder that holds unet/, vae/ and text_encoder/",
        )
    hub_id = None if path.exists() else hub.parse(model)
    if hub_id is not None:
        try:
            return hub.download(hub_id, say), hub_id.name
        except ModelError as error:
            also = f"and here is no such file or folder: {printable(path)}"
            raise ModelError(
                error.what, where=error.where, hint=error.hint, problems=[*error.problems, also]
            ) from error
    raise ModelError(
        "no such model",
        where=printable(path),
        hint="model: is `demo`, a .safetensors file, a diffusers folder, or a hub id owner/name",
    )


def _other(named: str | None, path: Path) -> Path:
    """Where a part is that the config may take from elsewhere."""
    if named is None:
        return path
    if not Path(named).exists():
        raise ModelError("no such file or folder", where=printable(named))
    return Path(named)


Said = tuple[diffusers_folder.NoiseConfig, Hint | None, list[str]]


def _in_folder(path: Path) -> Said:
    noise = diffusers_folder.scheduler_config(path)
    return noise, folder_hint(noise), []


def _in_file(path: Path) -> Said:
    file = read_single_file(path)
    notes = []
    if file.ema:
        notes.append(f"{file.ema} tensors are an averaged copy of the U-Net (EMA); it is not used")
    if file.unused:
        first = ", ".join(printable(name, limit=60) for name in file.unused[:3])
        notes.append(f"{len(file.unused)} tensors belong to no part and are not used: {first}")
    return diffusers_folder.STABLE_DIFFUSION_NOISE, file_hint(file.header, path), notes


def _unusual_types(unet: UNetPart) -> Iterator[str]:
    """A line when weights are in fewer bits than any net computes in, or in several types."""
    types = Counter(piece.dtype for piece in unet.pieces.values())
    if len(types) > 1 or any(dtype.startswith("F8") for dtype in types):
        counts = ", ".join(f"{count} in {dtype}" for dtype, count in types.most_common())
        yield f"the U-Net's tensors are {counts}; all are cast to the type of the run"


def _lacks(facts: BaseFacts) -> Iterator[tuple[str, str]]:
    spec, text = facts.spec, facts.text
    if spec.in_channels != LATENT_CHANNELS:
        purpose = PURPOSES.get(spec.in_channels, "another purpose")
        yield (
            f"this U-Net takes {spec.in_channels} channels: it is made for {purpose}, which this "
            "version does not train",
            "use the base model that it was made from",
        )
    if facts.vae is None:
        yield (
            f"{facts.vae_path.name} has no VAE" if facts.source.vae else "the model has no VAE",
            "name one in model.vae: the folder or file of a model of the same family",
        )
    wanted = 2 if spec.family == "sdxl" else 1
    if len(text) != wanted:
        found = f"{len(text)} text encoder{'' if len(text) == 1 else 's'}" if text else "none"
        yield (
            f"the model needs {wanted} text encoder{'s' if wanted > 1 else ''} and has {found}",
            "name a whole model of the same family in model.text",
        )
    elif not _speaks_to(spec, text):
        widths = " and ".join(str(part.config["hidden_size"]) for part in text)
        yield (
            f"the text encoder is {widths} wide, and the U-Net takes states of {spec.context_dim}",
            "name a whole model of the same family in model.text",
        )


def _speaks_to(spec: UNetSpec, text: tuple[TextPart, ...]) -> bool:
    """Whether the text encoders' states have the widths that the U-Net takes."""
    states = sum(part.config["hidden_size"] for part in text)
    pooled = text[-1].config["projection_dim"] if spec.pooled_dim is not None else None
    return (states, pooled) == (spec.context_dim, spec.pooled_dim)

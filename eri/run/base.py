"""The base model of a run: where it is, whether it can be used, and its parts when loaded."""

import importlib.resources
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from eri.diffusion import NoiseSchedule
from eri.errors import ModelError
from eri.files import sha256
from eri.formats import diffusers_folder
from eri.formats.header import read_header
from eri.models.load import load_unet
from eri.models.spec import build_spec
from eri.models.text import TextEncoder, load_text
from eri.models.unet import UNet, UNetSpec
from eri.models.vae import VAE, load_vae

__all__ = ["Base", "BaseFacts", "load_base", "look_at"]

WEIGHTED = ("unet", "vae", "text_encoder")
TRAINABLE = ("sd15",)
"""Families whose text encoders and conditions this version can prepare."""


@dataclass(frozen=True)
class BaseFacts:
    """What a base model's configs and headers say, before any weight is read."""

    path: Path
    name: str  # of the model, without its path
    spec: UNetSpec
    noise: diffusers_folder.NoiseConfig
    files: dict[str, list[Path]]  # weight files of each part
    parameters: dict[str, int]  # of each part
    latent_factor: int  # pixels that a latent pixel stands for, along each side

    @property
    def resolution(self) -> int:
        """Side in pixels of the images that the U-Net was trained on."""
        return self.spec.sample_size * self.latent_factor

    @property
    def step(self) -> int:
        """What every side of an image is a multiple of, in pixels, so that the U-Net can halve."""
        return self.spec.divisor * self.latent_factor

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each part's weights; slow for large files, so worked out when asked for."""
        return {part: "+".join(map(sha256, files)) for part, files in self.files.items()}


@dataclass(frozen=True)
class Base:
    """A base model's parts, loaded and frozen."""

    facts: BaseFacts
    unet: UNet
    vae: VAE
    text: TextEncoder
    schedule: NoiseSchedule


def look_at(model: str) -> BaseFacts:
    """Find a base model and read what can be read without its weights.

    Args:
        model: `demo`, or the path of a diffusers folder.

    Raises:
        ModelError: it is missing, not supported, damaged, or lacks a part.
    """
    path = _find(model)
    files = {part: diffusers_folder.weights(path / part) for part in WEIGHTED}
    _check_tokenizer(diffusers_folder.component(path, "tokenizer"))
    diffusers_folder.text_config(path / "text_encoder")
    levels = diffusers_folder.vae_config(path / "vae")["block_out_channels"]
    spec = build_spec(diffusers_folder.unet_config(path / "unet"))
    if spec.family not in TRAINABLE:
        raise ModelError(
            f"a model of the family {spec.family}; this version uses {', '.join(TRAINABLE)}",
            where=path,
        )
    noise = diffusers_folder.scheduler_config(path)
    if noise.rescale_betas_zero_snr:
        raise ModelError("this version does not train zero-terminal-SNR models", where=path)
    return BaseFacts(
        path=path,
        name=model if model == "demo" else path.name,
        spec=spec,
        noise=noise,
        files=files,
        parameters={part: sum(map(_count, files[part])) for part in WEIGHTED},
        latent_factor=2 ** (len(levels) - 1),
    )


def load_base(facts: BaseFacts, *, dtype: torch.dtype, device: torch.device) -> Base:
    """Load a base model's weights: the U-Net in `dtype`, everything else in float32."""
    return Base(
        facts=facts,
        unet=load_unet(facts.path, dtype=dtype, device=device),
        vae=load_vae(facts.path, device=device),
        text=load_text(facts.path, device=device),
        schedule=NoiseSchedule(
            beta_start=facts.noise.beta_start,
            beta_end=facts.noise.beta_end,
            beta_schedule=facts.noise.beta_schedule,
            timesteps=facts.noise.num_train_timesteps,
            prediction=facts.noise.prediction_type,
        ),
    )


def _find(model: str) -> Path:
    if model == "demo":
        return Path(str(importlib.resources.files("eri") / "demo" / "model"))
    path = Path(model).expanduser()
    if path.is_dir() and diffusers_folder.is_folder(path):
        return path
    if path.is_dir():
        raise ModelError(
            "this folder is not a diffusers model: it has no model_index.json",
            where=path,
            hint="point model: at the folder that holds unet/, vae/ and text_encoder/",
        )
    if path.is_file():
        read_header(path)  # a damaged or foreign file is named for what it is
        raise ModelError(
            "this version reads diffusers folders, not single files",
            where=path,
            hint="convert it: StableDiffusionPipeline.from_single_file(…).save_pretrained(…)",
        )
    raise ModelError(
        "no such model",
        where=path,
        hint="model: is `demo` or the path of a diffusers folder",
    )


def _count(file: Path) -> int:
    return sum(math.prod(tensor.shape) for tensor in read_header(file).tensors.values())


def _check_tokenizer(folder: Path) -> None:
    complete = (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )
    if not complete:
        raise ModelError(
            "the tokenizer has neither tokenizer.json nor both vocab.json and merges.txt",
            where=folder,
            hint="download the folder again",
        )

"""A random base model of SD1.5's topology in diffusers' layout, small enough for every test."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)

WORDS = ["red", "blue", "apple", "star", "gold"]


def save_sd15(folder: Path, *, depth: int = 2) -> Path:
    """Build with diffusers and transformers, and save, a whole model with random weights.

    Args:
        folder: to be made.
        depth: layers of each level of the U-Net; SD1.5 has two, distilled ones have one.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=depth,
        block_out_channels=(32, 32, 64, 64),
        attention_head_dim=4,
        cross_attention_dim=32,
        norm_num_groups=16,
    )
    perturbed(unet).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(16, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        sample_size=64,
    ).save_pretrained(folder / "vae")
    vocabulary = _vocabulary()
    CLIPTextModel(
        CLIPTextConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=len(vocabulary),
            bos_token_id=len(vocabulary) - 2,
            eos_token_id=len(vocabulary) - 1,
            pad_token_id=1,
        )
    ).save_pretrained(folder / "text_encoder")
    save_tokenizer(folder / "tokenizer", vocabulary)
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _vocabulary() -> list[str]:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    ends = [f"{letter}</w>" for letter in letters]
    return [*letters, *ends, *(f"{word}</w>" for word in WORDS), "<|startoftext|>", "<|endoftext|>"]


def perturbed(module: Module) -> Module:
    """The module with small random numbers added: norms and zero-initialised layers must matter."""
    for parameter in module.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return module


def save_tokenizer(
    folder: Path, vocabulary: list[str], merges: Sequence[str] = (), **settings: object
) -> None:
    """The files of a CLIP tokenizer; `settings` join its tokenizer_config.json."""
    folder.mkdir(parents=True)
    table = {token: index for index, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(table))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def on_meta(build: Callable[..., Module], *arguments: object) -> Module:
    """A module without memory for its weights."""
    with torch.device("meta"):
        return build(*arguments)

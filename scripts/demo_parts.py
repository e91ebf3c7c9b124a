"""The parts of the demo base model and the folder they are saved in.

UNet of SD1.5's topology at small width, AutoencoderKL, CLIP text encoder with a byte-pair
tokenizer: diffusers' folder layout, fp16 safetensors.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from emoji_pictures import SIZE
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Split
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MERGES = 1022
START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(texts: Sequence[str], folder: Path) -> CLIPTokenizer:
    """A byte-pair vocabulary in CLIP's files: every byte, every byte that ends a word, merges."""
    pieces = Tokenizer(BPE(end_of_word_suffix="</w>"))
    pieces.pre_tokenizer = Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    trainer = BpeTrainer(
        vocab_size=100_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False
    )
    pieces.train_from_iterator(texts, trainer)
    merges = json.loads(pieces.to_str())["model"]["merges"][:MERGES]
    letters = byte_letters()
    words = [*letters, *(c + "</w>" for c in letters), *map("".join, merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: index for index, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), "utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", special)
    return CLIPTokenizer.from_pretrained(folder)


def byte_letters() -> list[str]:
    """The 256 printable stand-ins for bytes that GPT-2's and CLIP's tokenizers share."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = 0x100 - len(printable)
    return [chr(byte) for byte in printable] + [chr(0x100 + i) for i in range(hidden)]


def new_vae() -> AutoencoderKL:
    """Four levels, factor 8, 1.7 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=2,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=SIZE,
        scaling_factor=1.0,
    )


def new_unet() -> UNet2DConditionModel:
    """SD1.5's topology at 5.7 M parameters."""
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(64, 64, 96, 64),
        layers_per_block=2,
        cross_attention_dim=96,
        attention_head_dim=4,  # the number of heads, as in SD1.5
        norm_num_groups=8,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two CLIP layers of width 96, 0.4 M parameters."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=384,
            projection_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_schedule() -> DDIMScheduler:
    """The noise of SD1.5: scaled-linear betas over 1000 steps, the network predicts epsilon."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


# The folder


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def save_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """fp16, complete or not there, readable by everybody."""
    halves = {key: tensor.detach().half().cpu().contiguous() for key, tensor in tensors.items()}
    partial = path.with_suffix(".partial")
    save_file(halves, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(path)


def save_autoencoder(vae: AutoencoderKL, folder: Path) -> None:
    vae.save_config(folder)
    save_weights(vae.state_dict(), folder / "diffusion_pytorch_model.safetensors")


def save_unet(unet: UNet2DConditionModel, folder: Path) -> None:
    unet.save_config(folder)
    save_weights(unet.state_dict(), folder / "diffusion_pytorch_model.safetensors")


def save_text_encoder(text: CLIPTextModel, folder: Path) -> None:
    """Under the names that every release of transformers reads."""
    text.config.architectures = ["CLIPTextModel"]
    text.config.save_pretrained(folder)
    tensors = {
        "text_model." + key.removeprefix("text_model."): tensor
        for key, tensor in text.state_dict().items()
    }
    save_weights(tensors, folder / "model.safetensors")


def save_index(folder: Path) -> None:
    """The scheduler's settings and the list of parts that diffusers' pipeline reads."""
    new_schedule().save_pretrained(folder / "scheduler")
    parts = {
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
    }
    header = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.38.0"}
    write_json(folder / "model_index.json", {**header, **parts, "requires_safety_checker": False})

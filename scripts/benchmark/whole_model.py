"""A whole SDXL with random weights: the size, the files and the speed of a real one."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.families import END, _save_clip_tokenizer, _save_index, _save_scheduler
from tests.full_size import random_unet

LEVELS = (128, 256, 512, 512)  # channels of the VAE


def save_whole_sdxl(folder: Path, device: torch.device) -> None:
    """Save it as a diffusers folder, in float16."""
    folder.mkdir(parents=True)
    unet = random_unet("sdxl", device).half()
    unet.save_pretrained(folder / "unet", max_shard_size="20GB")
    del unet
    torch.manual_seed(0)
    with torch.device(device):
        vae = AutoencoderKL(
            block_out_channels=LEVELS,
            down_block_types=("DownEncoderBlock2D",) * len(LEVELS),
            up_block_types=("UpDecoderBlock2D",) * len(LEVELS),
            layers_per_block=2,
            sample_size=1024,
            scaling_factor=0.13025,
        )
        first = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                projection_dim=768,
            )
        )
        second = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=20,
                projection_dim=1280,
                hidden_act="gelu",
            )
        )
    parts = {"vae": vae, "text_encoder": first, "text_encoder_2": second}
    for name, part in parts.items():
        part.half().save_pretrained(folder / name)
    _save_clip_tokenizer(folder / "tokenizer", pad=END)
    _save_clip_tokenizer(folder / "tokenizer_2", pad="!")
    _save_scheduler(folder, EulerDiscreteScheduler, timestep_spacing="leading", steps_offset=1)
    _save_index(folder, "StableDiffusionXLPipeline", "EulerDiscreteScheduler")

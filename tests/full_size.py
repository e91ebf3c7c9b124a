"""U-Nets of their published size with random weights, built on whatever device is there."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.compvis_names import compvis_unet_names

UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def random_unet(family: str, device: torch.device | str) -> Any:
    """diffusers' U-Net in float32, its weights exact in bfloat16 and of the size that keeps a
    layer's output like its input."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**UNETS[family])
    unet = unet.to_empty(device=device).requires_grad_(False).eval()
    draws = torch.Generator(device=device).manual_seed(0)
    for name, parameter in unet.named_parameters():
        parameter.normal_(generator=draws)
        if parameter.ndim > 1:
            parameter.mul_(parameter[0].numel() ** -0.5)
        else:
            parameter.mul_(0.05).add_(name.endswith("weight"))  # a norm's weight is around 1
        parameter.copy_(parameter.bfloat16())
    return unet


def save_single_file(unet: Any, path: Path) -> Path:
    """The U-Net alone in bfloat16, in the names of single files."""
    tensors = {name: tensor.bfloat16().cpu() for name, tensor in unet.state_dict().items()}
    names = compvis_unet_names(tensors)
    save_file({f"model.diffusion_model.{names[n]}": t for n, t in tensors.items()}, path)
    return path

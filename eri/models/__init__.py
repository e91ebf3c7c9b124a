"""Base models: the U-Net and its blocks, and the text encoder and autoencoder around it."""

from eri.models.blocks import MLP, ResNetBlock, TransformerBlock
from eri.models.load import load_unet
from eri.models.stage import LoRAUNetBlock, UNetConfig
from eri.models.text import load_text
from eri.models.unet import UNet
from eri.models.vae import load_vae

__all__ = [
    "MLP",
    "LoRAUNetBlock",
    "ResNetBlock",
    "TransformerBlock",
    "UNet",
    "UNetConfig",
    "load_text",
    "load_unet",
    "load_vae",
]

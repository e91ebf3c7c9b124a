"""LoRA fine-tuning of UNet diffusion models. Import what you need from its packages."""

__version__ = "0.1.0"

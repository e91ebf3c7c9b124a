"""The names that users import, and that nothing else is promised by accident."""

import importlib

import pytest

PUBLIC = {
    "eri.layers": """
        Linear Conv2d Conv2dConfig LayerNorm GroupNorm RMSNorm BatchNorm2d ReLU GELU SiLU Tanh
        Sigmoid Dropout MultiHeadAttention FlashAttention LoRALinear LoRAConv2d LoRAAttention
        Embeddings LinearWithWeights MulRows Reshape Residual SwiGLU SAMultiHead Conv Layers
        init functional
    """,
    "eri.models": """
        ResNetBlock TransformerBlock MLP UNetConfig LoRAUNetBlock UNet load_unet load_text load_vae
    """,
    "eri.adapters": "attach load_adapter",
}


@pytest.mark.parametrize(
    ("package", "name"),
    [(package, name) for package, names in PUBLIC.items() for name in names.split()],
)
def test_name_can_be_imported(package: str, name: str) -> None:
    module = importlib.import_module(package)
    assert hasattr(module, name), f"from {package} import {name}"
    assert name in module.__all__, f"{name} is missing in __all__ of {package}"

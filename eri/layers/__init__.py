"""The documented layers. Importing this package builds nothing and loads no model library.

Seed rows: B53.
"""

from eri.layers import functional, init
from eri.layers.activation import GELU, NewReLu, ReLU, Sigmoid, SiLU, Swish, Tanh
from eri.layers.attention import FlashAttention, MultiHeadAttention
from eri.layers.batch_norm import BatchNorm2d
from eri.layers.checks import check_same_device
from eri.layers.conv import Conv2d, Conv2dConfig
from eri.layers.dropout import Dropout
from eri.layers.embeddings import Embeddings
from eri.layers.layers import Layers
from eri.layers.layout import shape_to_whd, whd_to_shape
from eri.layers.linear import Linear
from eri.layers.linear_with_weights import LinearWithWeights
from eri.layers.lora import LoRALayer
from eri.layers.lora_attention import LoRAAttention
from eri.layers.lora_conv import LoRAConv2d
from eri.layers.lora_linear import LoRALinear
from eri.layers.mul_rows import MulRows
from eri.layers.norm import GroupNorm, LayerNorm, RMSNorm
from eri.layers.packed_conv import Conv
from eri.layers.reshape import Reshape
from eri.layers.residual import Residual
from eri.layers.rope import apply_rope
from eri.layers.sa_multihead import SAMultiHead
from eri.layers.swiglu import SwiGLU
from eri.layers.weights import materialize

__all__ = [
    "GELU",
    "BatchNorm2d",
    "Conv",
    "Conv2d",
    "Conv2dConfig",
    "Dropout",
    "Embeddings",
    "FlashAttention",
    "GroupNorm",
    "LayerNorm",
    "Layers",
    "Linear",
    "LinearWithWeights",
    "LoRAAttention",
    "LoRAConv2d",
    "LoRALayer",
    "LoRALinear",
    "MulRows",
    "MultiHeadAttention",
    "NewReLu",
    "RMSNorm",
    "ReLU",
    "Reshape",
    "Residual",
    "SAMultiHead",
    "SiLU",
    "Sigmoid",
    "SwiGLU",
    "Swish",
    "Tanh",
    "apply_rope",
    "check_same_device",
    "functional",
    "init",
    "materialize",
    "shape_to_whd",
    "whd_to_shape",
]

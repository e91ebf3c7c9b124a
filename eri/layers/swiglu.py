r"""A gated feed-forward layer, and its gate as one operation.

$$y = \mathrm{silu}(g) \odot v,\quad \mathrm{silu}(g) = g\,\sigma(g)$$

and

$$dv = dy \odot \mathrm{silu}(g),\quad dg = dy \odot v \odot \sigma(g)\,(1 + g\,(1 - \sigma(g)))$$

Fused is each of the two: g and v are read once and y written, 6 bytes an element in 16 bits;
backward dy, g and v are read, dg and dv written, 10 bytes. silu(g) is neither rounded nor kept.

Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.

Limits of the kernels: sm_80 or newer; float32, float16 or bfloat16, g and v of one shape and type;
a multiple of 8 elements, or of 4 in float32, less than 2³⁴. Inputs with gaps are copied. A gradient
that is differentiated again, and programs of `torch.compile`, which fuses by itself, take PyTorch's
own operations.

Measured with `pytest -s -m gpu tests/layers/test_swiglu.py -k bandwidth`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library
from torch.types import Device

from eri.layers.backend import use_kernel
from eri.layers.init import KAIMING_NORMAL_RELU, Initializer
from eri.layers.linear import Linear
from eri.layers.vectors import VECTOR, aligned, type_name, unsupported_type
from eri.layers.weights import OwnsWeights, Provider

__all__ = ["SwiGLU", "swiglu", "swiglu_backward_reference", "swiglu_reference", "unsupported"]

MOST_ELEMENTS = 2**34


def swiglu_reference(gate: Tensor, value: Tensor) -> Tensor:
    """What `swiglu` is, in PyTorch's own operations."""
    return F.silu(gate) * value


def swiglu_backward_reference(dy: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and value, in PyTorch's own operations."""
    dtype = torch.promote_types(gate.dtype, torch.float32)
    dy, g, v = (part.to(dtype) for part in (dy, gate, value))
    s = g.sigmoid()
    d_gate = dy * v * (s * (1 + g * (1 - s)))
    return d_gate.to(gate.dtype), (dy * (g * s)).to(value.dtype)


def unsupported(gate: Tensor, value: Tensor) -> str | None:
    """Why the kernels cannot take these, in words; None where they can."""
    if (reason := unsupported_type("gate", gate)) is not None:
        return reason
    if value.dtype != gate.dtype:
        return f"gate is {type_name(gate.dtype)}, and value {type_name(value.dtype)}"
    if value.shape != gate.shape:
        return f"gate is {list(gate.shape)}, and value {list(value.shape)}"
    if not 0 < gate.numel() < MOST_ELEMENTS:
        return f"gate has {gate.numel()} elements, not 1 to {MOST_ELEMENTS - 1}"
    vector = VECTOR // gate.element_size()
    if gate.numel() % vector:
        return f"gate has {gate.numel()} elements, not a multiple of {vector}"
    return None


LIBRARY = Library("eri", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define("swiglu(Tensor gate, Tensor value) -> Tensor", tags=TAGS)
LIBRARY.define(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor value) -> (Tensor, Tensor)", tags=TAGS
)


@torch.library.impl(LIBRARY, "swiglu", "CPU")
def _swiglu_on_cpu(gate: Tensor, value: Tensor) -> Tensor:
    return swiglu_reference(gate, value).contiguous()


@torch.library.impl(LIBRARY, "swiglu_backward", "CPU")
def _swiglu_backward_on_cpu(dy: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_value = swiglu_backward_reference(dy, gate, value)
    return d_gate.contiguous(), d_value.contiguous()


@torch.library.register_fake("eri::swiglu", lib=LIBRARY)
def _swiglu_fake(gate: Tensor, value: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.register_fake("eri::swiglu_backward", lib=LIBRARY)
def _swiglu_backward_fake(dy: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    gate, value = ctx.saved_tensors
    again = torch.is_grad_enabled()  # the gradient is differentiated, too
    if not again and use_kernel("swiglu", gate.device, lambda: unsupported(gate, value)):
        return torch.ops.eri.swiglu_backward(_dense(dy), _dense(gate), _dense(value))
    return swiglu_backward_reference(dy, gate, value)


torch.library.register_autograd("eri::swiglu", _backward, setup_context=_keep, lib=LIBRARY)


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """SiLU(gate) ⊙ value, of one shape.

    Raises:
        ConfigError: the backend is `cuda` and the kernel cannot be used.
    """
    if torch.compiler.is_compiling() or not use_kernel(
        "swiglu", gate.device, lambda: unsupported(gate, value)
    ):
        return swiglu_reference(gate, value)
    return torch.ops.eri.swiglu(_dense(gate), _dense(value))


def _dense(numbers: Tensor) -> Tensor:
    """Numbers as the kernels read them; a copy only where they lie otherwise."""
    return aligned(numbers.contiguous())


class SwiGLU(OwnsWeights):
    """y = (SiLU(x W1) ⊙ x W2) W3, without biases.

    W1 is the gate, W2 the value and W3 the way back. LLaMA's names differ: its w1 is W1, its w3
    is W2 and its w2 is W3. The three are linear layers `w1`, `w2` and `w3`, the width of x follows
    from the first input, and a provider sees `[in, hidden]`, `[in, hidden]`, `[hidden, features]`.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.
    Seed rows: B41–B44.

    Args:
        features_count: width of the output.
        hidden_size: width between.
        init_weights: fills the three weights by their own fans.
        provide_weights: called by `load_from_provider` with W1, W2 and W3.
    """

    def __init__(
        self,
        features_count: int,
        hidden_size: int,
        *,
        init_weights: Initializer = KAIMING_NORMAL_RELU,
        provide_weights: Provider | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()

        def lazy(features: int) -> Linear:
            return Linear.lazy(features, init_weights=init_weights, device=device, dtype=dtype)

        self.w1 = lazy(hidden_size)
        self.w2 = lazy(hidden_size)
        self.w3 = lazy(features_count)
        self.provide_weights = provide_weights

    def provider_views(self) -> tuple[Tensor | None, ...]:
        """W1, W2 and W3 as `[in, out]`."""
        return tuple(linear.provider_views()[0] for linear in (self.w1, self.w2, self.w3))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., features_count]`."""
        return self.w3(swiglu(self.w1(x), self.w2(x)))

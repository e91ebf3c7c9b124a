r"""A linear layer with a low-rank update, and both passes of it as few products.

$$y = x W^T + b + H B^T,\quad H = s\,x A^T$$

and

$$dx = dy\,W + P A,\quad P = s\,dy\,B,\quad \Delta A = P^T x,\quad \Delta B = dy^T H$$

`lora_linear` makes them by the operations of lean blocks (`eri.layers.projection`): H, P, ΔA and ΔB
by kernels (`eri.layers.lora_products`), and what the update adds to y and to dx by a product each,
in place. ΔA and ΔB are summed in float32 into tensors of their own, not onto `grad`, so that
`torch.autograd.grad`, hooks, accumulation and whoever averages over processes see what they see of
any layer. Kept are x, H and, in the type of x, copies of A and B.

Sources: Hu et al., "LoRA", arXiv 2106.09685; Zhu et al., "LoRAFusion", arXiv 2510.00206, section 3.

Limits: those of the products: sm_80 or newer; float32, float16 or bfloat16, A and B float32; widths
of a multiple of 8, or of 4 in float32; a rank of at most 4096; less than 2³⁰ rows. The base is
frozen, of x's type, and without hooks; autocast, dropout at work and anything else take PyTorch's
own operations, as do `torch.compile` and `torch.func`, and gradients that are differentiated again.
There is no forward-mode differentiation.

Measured with `scripts/bench step --family sdxl --batch 4 --cases eri:lean=off`, where all adapted
layers run so.
"""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from eri.layers.backend import is_transformed, use_kernel
from eri.layers.conv import Conv2d
from eri.layers.linear import Linear
from eri.layers.lora import LoRALayer, check_rank, master_dtype
from eri.layers.lora_products import MOST_RANKS, MOST_ROWS, PADDING, lora_down, lora_gradient
from eri.layers.vectors import VECTOR, aligned_rows, type_name, unsupported_type

__all__ = [
    "LoRALinear",
    "lora_linear",
    "lora_linear_backward_reference",
    "runs_fused",
    "unsupported",
]

PLAIN = {nn.Linear.forward, Linear.forward, nn.Conv2d.forward, Conv2d.forward}


def lora_linear_backward_reference(  # noqa: PLR0917 - what the function keeps
    dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, A and B, in PyTorch's own operations, which have gradients again."""
    down, up = a.to(x.dtype), b.to(x.dtype)
    rows, dys = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    h, p = scale * (rows @ down.T), scale * (dys @ up)
    dx = (dys @ weight + p @ down).view(x.shape)
    return dx, (p.T @ rows).to(a.dtype), (dys.T @ h).to(b.dtype)


def unsupported(x: Tensor, layer: LoRALayer[Any]) -> str | None:
    """Why a layer does not run as `lora_linear` on x, in words; None where it does.

    Args:
        x: rows `[..., K]`, or pixels `[B, K, H, W]` of a convolution.
        layer: linear, or a convolution of 1×1.
    """
    return _unsupported_base(x, layer.base) or _unsupported_update(x, layer)


def _unsupported_base(x: Tensor, base: nn.Linear | nn.Conv2d) -> str | None:
    hooks = (
        *(base._forward_pre_hooks, base._forward_hooks),
        *(base._backward_pre_hooks, base._backward_hooks),
    )
    if getattr(base.forward, "__func__", None) not in PLAIN or any(hooks):
        return f"the base, {type(base).__name__}, has hooks or a way of its own to run"
    weight = base.weight
    if type(weight) not in {Tensor, nn.Parameter}:
        return f"the base's weight is a {type(weight).__name__}"
    if weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "the base trains"
    if (reason := unsupported_type("x", x)) is not None:
        return reason
    if weight.dtype != x.dtype:
        return f"x is {type_name(x.dtype)}, and the base {type_name(weight.dtype)}"
    return None


def _unsupported_update(x: Tensor, layer: LoRALayer[Any]) -> str | None:
    for name, matrix in ("A", layer.lora_a.weight), ("B", layer.lora_b.weight):
        if matrix.dtype != torch.float32 or matrix.device != x.device:
            return f"{name} is {type_name(matrix.dtype)} on {matrix.device}, not float32 beside x"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast chooses the types"
    (outputs, inputs, *_), vector = layer.base.weight.shape, VECTOR // x.element_size()
    if not inputs or not outputs or inputs % vector or outputs % vector:
        return f"it maps {inputs} numbers to {outputs}, not multiples of {vector}"
    if layer.rank > MOST_RANKS:
        return f"its rank is {layer.rank}, more than {MOST_RANKS}"
    if x.numel() // inputs >= MOST_ROWS:
        return f"x has {x.numel() // inputs} rows, not less than {MOST_ROWS}"
    return None


def runs_fused(x: Tensor, layer: LoRALayer[Any]) -> bool:
    """Whether a layer, linear or a convolution of 1×1, runs as `lora_linear` on x.

    Raises:
        ConfigError: the backend is `cuda` and the kernels cannot be used.
    """
    dropping = layer.dropout.training and layer.dropout.p > 0
    if layer.merged or dropping or is_transformed():
        return False
    return use_kernel("lora_linear", x.device, lambda: unsupported(x, layer))


def lora_linear(  # noqa: PLR0917 - the signature of F.linear, and the update
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """x Wᵀ + bias + scale · (x Aᵀ) Bᵀ, with gradients of x, A and B.

    Args:
        x: `[..., K]`.
        weight: frozen, of the type of x, `[N, K]`.
        bias: likewise, `[N]`.
        a: `[r, K]`, float32.
        b: `[N, r]`, float32.
        scale: of the update.

    Returns:
        `[..., N]`, contiguous.

    Raises:
        ConfigError: the backend is `cuda` and the kernels cannot be used.
    """
    return _LoRALinear.apply(x, weight, bias, a, b, scale)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        rows = _rows(x)
        down, up = _padded(a, x.dtype), _padded(b.T, x.dtype)
        h = lora_down(rows, down, 1, scale)
        y = F.linear(rows, weight, bias).addmm_(h, up)
        ctx.save_for_backward(x, weight, a, b, h, down, up)
        ctx.scale = scale
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, a, b, h, down, up = ctx.saved_tensors
        needs_dx, _, _, needs_da, needs_db, _ = ctx.needs_input_grad
        dx = da = db = None
        with torch.autocast(x.device.type, enabled=False):  # the forward pass ran without
            if torch.is_grad_enabled():  # the gradient is differentiated, too
                dx, da, db = lora_linear_backward_reference(grads[0], x, weight, a, b, ctx.scale)
                return dx, None, None, da, db, None
            dy = _rows(grads[0])
            p = lora_down(dy, up, 1, ctx.scale)
            if needs_dx:
                dx = (dy @ weight).addmm_(p, down).view(x.shape)
            if needs_da or needs_db:
                da, db = a.new_zeros(a.shape), b.new_zeros(b.shape)
                lora_gradient(dy, _rows(x), p, h, da, db[None])
        return dx, None, None, da, db, None


def _rows(x: Tensor) -> Tensor:
    """x `[..., K]` as rows that kernels read; copied only if they lie otherwise."""
    return aligned_rows(x.reshape(-1, x.shape[-1]))


def _padded(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy `[r, C]` in another type, with rows of zeros up to a multiple of 8."""
    rank, width = matrix.shape
    copy = matrix.new_empty((-(-rank // PADDING) * PADDING, width), dtype=dtype)
    copy[:rank] = matrix
    copy[rank:] = 0
    return copy


class LoRALinear(LoRALayer[nn.Linear]):
    """y = base(x) + scale · B(A(dropout(x))) with a frozen base.

    `base` is a linear layer, `lora_a.weight` is `[rank, in_features]`, drawn from
    U(±1/√in_features), and `lora_b.weight` is `[out_features, rank]`, zero. `scale` is
    alpha / rank, and 1.0 when no alpha is given. See `LoRALayer` for dtypes, `delta`, `merge`
    and `unmerge`, and the top of the file for what runs on a card with kernels.

    Source: Hu et al., "LoRA", arXiv 2106.09685, section 4.1.
    Seed rows: A20–A31.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: width between A and B.
        alpha: numerator of the scale.
        dropout: probability that an element of the adapter's input is dropped in training.
        bias: whether the base has a bias.
        dtype: of the base; A and B are float32 at least.

    Raises:
        ValueError: the rank is not a positive integer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        base = Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._adapt(base, rank, alpha=alpha, dropout=dropout, generator=None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Adapt an existing layer, which becomes `base` itself, unchanged but frozen.

        Args:
            linear: the layer to adapt.
            rank: width between A and B.
            alpha: numerator of the scale.
            dropout: probability that an element of the adapter's input is dropped in training.
            generator: a CPU generator to draw A with.
        """
        layer = cls.__new__(cls)
        layer._adapt(linear, rank, alpha=alpha, dropout=dropout, generator=generator)
        return layer

    def _adapt(
        self,
        base: nn.Linear,
        rank: int,
        *,
        alpha: float | None,
        dropout: float,
        generator: torch.Generator | None,
    ) -> None:
        check_rank(self, rank)
        dtype, device = master_dtype(base.weight), base.weight.device
        lora_a = Linear(base.in_features, rank, bias=False, device="meta", dtype=dtype)
        lora_b = Linear(rank, base.out_features, bias=False, device="meta", dtype=dtype)
        super().__init__(
            base,
            lora_a.to_empty(device=device),
            lora_b.to_empty(device=device),
            alpha=alpha,
            dropout=dropout,
            generator=generator,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`, in the dtype of the base's output."""
        base = self.base
        if x.shape[-1:] == (base.in_features,) and runs_fused(x, self):
            a, b = self.lora_a.weight, self.lora_b.weight
            return lora_linear(x, base.weight, base.bias, a, b, self.scale)
        y = base(x)
        if self.merged:
            return y
        down = F.linear(self.dropout(x), self.lora_a.weight.to(x.dtype))
        up = F.linear(down, self.lora_b.weight.to(x.dtype))
        return torch.add(y, up, alpha=self.scale)

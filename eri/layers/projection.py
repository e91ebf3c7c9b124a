r"""Frozen linear layers with low-rank updates, run with few launches and keeping little.

Layers that read the same input, like the three projections of a self-attention, run as one: their
frozen weights lie side by side in memory and so do their updates, so that

$$y = x\,W^T + s\,H B^T,\quad H = x A^T$$

is three launches for all of them, the last of which adds onto y in place. The backward pass is

$$P = dy\,B,\quad dx = dy\,W + s\,P A,\quad \Delta A = s\,P^T x,\quad \Delta B = s\,dy^T H$$

and adds ΔA and ΔB in float32 straight onto the parameters' `grad`, without a tensor between
("gradient accumulation fusion": Shoeybi et al., arXiv 1909.08053, and its code).

Three functions wrap it for autograd, each keeping what cannot be computed again cheaply:
`project` its input, `norm_project` the input of a LayerNorm before it, `feed_forward` its input and
what goes into its gate.

Source: Hu et al., "LoRA", arXiv 2106.09685; Chen et al., "Training Deep Nets with Sublinear Memory
Cost", arXiv 1604.06174.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from eri.layers.geglu import geglu, geglu_backward
from eri.layers.layer_norm import layer_norm, layer_norm_backward
from eri.layers.lora import LoRALayer, base_of

__all__ = ["Projection", "feed_forward", "norm_project", "project", "side_by_side"]


def side_by_side(tensors: Sequence[Tensor]) -> Tensor | None:
    """Tensors of one shape `[N, ...]` as one `[n, N, ...]` without a copy; None: they lie apart."""
    first = tensors[0]
    step = first.numel()
    for place, tensor in enumerate(tensors):
        if (
            tensor.shape != first.shape
            or tensor.dtype != first.dtype
            or not tensor.is_contiguous()
            or tensor.untyped_storage()._cdata != first.untyped_storage()._cdata
            or tensor.storage_offset() != first.storage_offset() + place * step
        ):
            return None
    return first.detach().as_strided(
        (len(tensors), *first.shape), (step, *first.stride()), first.storage_offset()
    )


@dataclass(frozen=True)
class _Update:
    """The low-rank updates of n layers of one width, whose outputs lie side by side."""

    start: int  # first column of y
    down: Tensor  # A of all, [n·r, K]
    up: Tensor  # B, [n, N, r]
    d_down: Tensor  # float32, like `down`
    d_up: Tensor  # float32, like `up`
    scale: float

    def columns(self, y: Tensor) -> Tensor:
        """What the layers give, of y `[T, ΣN]`, as `[n, T, N]`."""
        n, width, _ = self.up.shape
        part = y.narrow(1, self.start, n * width)
        return part.unflatten(1, (n, width)).transpose(0, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the update onto y `[T, ΣN]` in place; H `[T, n·r]` is returned."""
        h = x @ self.down.T
        if len(self.up) == 1:
            self.columns(y)[0].addmm_(h, self.up[0].T, alpha=self.scale)
        else:
            self.columns(y).baddbmm_(self._split(h), self.up.mT, alpha=self.scale)
        return h

    def backward(self, dy: Tensor, x: Tensor, h: Tensor, dx: Tensor | None) -> None:
        """Add to the gradients of A, of B and, unless it is None, of x."""
        dys = self.columns(dy)
        p = torch.empty_like(h)
        if len(self.up) == 1:
            torch.mm(dys[0], self.up[0], out=p)
            _accumulate(self.d_up[0], dys[0].T, h, self.scale)
        else:
            torch.bmm(dys, self.up, out=self._split(p))
            _accumulate(self.d_up, dys.mT, self._split(h), self.scale)
        _accumulate(self.d_down, p.T, x, self.scale)
        if dx is not None:
            dx.addmm_(p, self.down, alpha=self.scale)

    def _split(self, h: Tensor) -> Tensor:
        """`[T, n·r]` as `[n, T, r]`."""
        return h.unflatten(1, (len(self.up), -1)).transpose(0, 1)


class Projection:
    """Linear layers, or 1×1 convolutions, with the same input, as one.

    Args:
        layers: each plain or with a low-rank update that is neither merged nor drops anything.
        dtype: in which they compute.
    """

    def __init__(self, layers: Sequence[nn.Module], dtype: torch.dtype) -> None:
        bases = [base_of(layer) for layer in layers]
        weights = [base.weight.flatten(1) for base in bases]
        stacked = side_by_side(weights)
        self.weight = torch.cat(weights) if stacked is None else stacked.flatten(0, 1)
        self.bias = _side_by_side_bias(bases)
        adapted = [layer for layer in layers if isinstance(layer, LoRALayer) and not layer.merged]
        self.parameters = [
            p for layer in adapted for p in (layer.lora_a.weight, layer.lora_b.weight)
        ]
        self._layers = layers
        self._dtype = dtype

    @property
    def updates(self) -> list[_Update]:
        """The low-rank updates, as few as the memory allows."""
        return _updates(self._layers, self._dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """y `[T, ΣN]` of x `[T, K]`, and H of each update."""
        y = F.linear(x, self.weight, self.bias)
        return y, [update.forward(x, y) for update in self.updates]

    def backward(
        self, dy: Tensor, x: Tensor, hidden: Sequence[Tensor], needs_dx: bool
    ) -> Tensor | None:
        """The gradient of x, if it is needed; those of the updates are added to theirs."""
        dx = dy @ self.weight if needs_dx else None
        for update, h in zip(self.updates, hidden, strict=True):
            update.backward(dy, x, h, dx)
        return dx


def project(x: Tensor, *layers: nn.Module, residual: Tensor | None = None) -> Tensor:
    """Run linear layers on the same input, which is what is kept of them.

    Args:
        x: `[..., K]`.
        layers: plain or with a low-rank update; or 1×1 convolutions, of which x are the pixels.
        residual: is added, `[..., ΣN]`.

    Returns:
        Their outputs side by side, `[..., ΣN]`.
    """
    projection = Projection(layers, x.dtype)
    return _Project.apply(x, residual, projection, *projection.parameters)


def norm_project(x: Tensor, norm: nn.LayerNorm, *layers: nn.Module) -> Tensor:
    """Run linear layers on `norm(x)`, keeping x; see `project`."""
    projection = Projection(layers, x.dtype)
    return _NormProject.apply(x, norm, projection, *projection.parameters)


def feed_forward(
    x: Tensor, norm: nn.LayerNorm, inner: nn.Module, outer: nn.Module, *, recompute: bool = False
) -> Tensor:
    """`x + outer(geglu(inner(norm(x))))`, keeping x and what `inner` gave.

    Args:
        x: `[..., D]`.
        norm: before the first layer.
        inner: D to 2·W, values and gates; plain or with a low-rank update.
        outer: W to D; likewise.
        recompute: whether the backward pass runs `inner` again instead of keeping what it gave.
    """
    first, second = Projection([inner], x.dtype), Projection([outer], x.dtype)
    parameters = (*first.parameters, *second.parameters)
    return _FeedForward.apply(x, norm, first, second, recompute, *parameters)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, projection: Projection, *parameters: Tensor
    ) -> Tensor:
        y, hidden = projection.forward(x.flatten(0, -2))
        ctx.projection = projection
        ctx.save_for_backward(x, *hidden)
        y = y.unflatten(0, x.shape[:-1])
        return y if residual is None else y.add_(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *hidden = ctx.saved_tensors
        dy = grads[0].flatten(0, -2)
        dx = ctx.projection.backward(dy, x.flatten(0, -2), hidden, ctx.needs_input_grad[0])
        dx = None if dx is None else dx.view(x.shape)
        d_residual = grads[0] if ctx.needs_input_grad[1] else None
        return dx, d_residual, None, *[None] * len(ctx.projection.parameters)


class _NormProject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: nn.LayerNorm, projection: Projection, *parameters: Tensor
    ) -> Tensor:
        n, mean_rstd = layer_norm(x, norm)
        y, hidden = projection.forward(n.flatten(0, -2))
        ctx.norm, ctx.projection = norm, projection
        ctx.save_for_backward(x, mean_rstd, *hidden)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, mean_rstd, *hidden = ctx.saved_tensors
        norm = ctx.norm
        n = layer_norm(x, norm)[0].flatten(0, -2)
        needs_dx = ctx.needs_input_grad[0]
        dn = ctx.projection.backward(grads[0].flatten(0, -2), n, hidden, needs_dx)
        dx = None if dn is None else layer_norm_backward(dn, x, mean_rstd, norm)
        return dx, None, None, *[None] * len(ctx.projection.parameters)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 (autograd's order)
        ctx: Any,
        x: Tensor,
        norm: nn.LayerNorm,
        inner: Projection,
        outer: Projection,
        recompute: bool,
        *parameters: Tensor,
    ) -> Tensor:
        n, mean_rstd = layer_norm(x, norm)
        u, inner_hidden = inner.forward(n.flatten(0, -2))
        y, outer_hidden = outer.forward(geglu(u))
        ctx.norm, ctx.inner, ctx.outer, ctx.inputs = norm, inner, outer, len(parameters)
        ctx.split = len(inner_hidden)
        kept = None if recompute else u
        ctx.save_for_backward(x, mean_rstd, kept, *inner_hidden, *outer_hidden)
        return y.unflatten(0, x.shape[:-1]).add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, mean_rstd, u, *hidden = ctx.saved_tensors
        inner_hidden, outer_hidden = hidden[: ctx.split], hidden[ctx.split :]
        dy = grads[0].flatten(0, -2)
        n = layer_norm(x, ctx.norm)[0].flatten(0, -2)
        if u is None:
            u = ctx.inner.forward(n)[0]
        da = ctx.outer.backward(dy, geglu(u), outer_hidden, True)
        dn = ctx.inner.backward(geglu_backward(da, u), n, inner_hidden, ctx.needs_input_grad[0])
        dx = None
        if dn is not None:
            dx = layer_norm_backward(dn, x, mean_rstd, ctx.norm, grads[0])
        return dx, *[None] * (4 + ctx.inputs)


def _side_by_side_bias(layers: Sequence[nn.Linear | nn.Conv2d]) -> Tensor | None:
    """The biases of some layers as one, zeros for one without; None if none has one."""
    if all(layer.bias is None for layer in layers):
        return None
    biases = [
        layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
        for layer in layers
    ]
    return biases[0] if len(biases) == 1 else torch.cat(biases)


def _updates(layers: Sequence[nn.Module], dtype: torch.dtype) -> list[_Update]:
    """The low-rank updates of some layers, as one where their matrices lie side by side."""
    adapted = [(layer, start) for layer, start in _starts(layers) if not layer.merged]
    if len(adapted) == len(layers) > 1 and len({layer.scale for layer, _ in adapted}) == 1:
        columns = zip(*(_matrices(layer, dtype) for layer, _ in adapted), strict=True)
        stacks = [side_by_side(column) for column in columns]
        whole = [stack for stack in stacks if stack is not None]
        if len(whole) == len(stacks):
            return [_update(whole, 0, adapted[0][0].scale)]
    return [
        _update([matrix[None] for matrix in _matrices(layer, dtype)], start, layer.scale)
        for layer, start in adapted
    ]


def _starts(layers: Sequence[nn.Module]) -> list[tuple[LoRALayer, int]]:
    """Those with an update, each with its first column among the outputs of all."""
    widths = [len(base_of(layer).weight) for layer in layers]
    starts = accumulate(widths, initial=0)
    pairs = zip(layers, starts, strict=False)  # the last start is where all end
    return [(layer, start) for layer, start in pairs if isinstance(layer, LoRALayer)]


def _matrices(layer: LoRALayer, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B and the gradients of both, as matrices."""
    down, up = layer.matrices(dtype)
    return down, up, _grad(layer.lora_a.weight), _grad(layer.lora_b.weight)


def _update(stacks: Sequence[Tensor], start: int, scale: float) -> _Update:
    """From A, B and their gradients, each of n layers, `[n, rows, columns]`."""
    down, up, d_down, d_up = stacks
    return _Update(start, down.flatten(0, 1), up, d_down.flatten(0, 1), d_up, scale)


def _grad(parameter: nn.Parameter) -> Tensor:
    """The gradient of a matrix as `[rows, columns]`, made of zeros if there is none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad.flatten(1)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """total += scale · a b, summed in the type of `total`, for matrices or stacks of them."""
    if a.dtype == total.dtype:
        (total.addmm_ if total.ndim == 2 else total.baddbmm_)(a, b, alpha=scale)
    elif a.is_cuda:
        add = torch.ops.aten.addmm if total.ndim == 2 else torch.ops.aten.baddbmm
        add.dtype_out(total, a, b, total.dtype, alpha=scale, out=total)
    else:
        _accumulate(total, a.to(total.dtype), b.to(total.dtype), scale)

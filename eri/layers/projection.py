r"""Frozen linear layers with low-rank updates, run as one product.

Layers that read the same input, like the three projections of a self-attention, run as one. Their
frozen weights W and their matrices A and B lie in one piece of memory, [N + R, K + R],

$$\begin{bmatrix} W & B \\ A & 0 \end{bmatrix}$$

so that forward and backward pass are a product each, over rows with a *tail* of R more columns:

$$y = [x, H]\,[W, B]^T,\quad H = s\,x A^T,\qquad dx = [dy, P]\,[W; A],\quad P = s\,dy\,B$$

H and P are narrow (`eri.layers.lora_products`), and so are the gradients of the matrices,

$$\Delta A = P^T x,\quad \Delta B = dy^T H$$

which are added in float32 straight onto the parameters' `grad`, without a tensor between
("gradient accumulation fusion": Shoeybi et al., arXiv 1909.08053, and its code). Rows without a
tail are taken, too; then the update is added onto y, and onto dx, in place.

A and B here are copies of the parameters, in the type of W. They are copied anew when autograd
knows that the parameters have changed; whoever changes them otherwise, as `Flat` does, makes the
`copies` of each layer's `copied_by`.

Source: Hu et al., "LoRA", arXiv 2106.09685; Zhu et al., "LoRAFusion", arXiv 2510.00206, section 3.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from eri.layers.lora import LoRALayer, MatrixCopy, base_of
from eri.layers.lora_copies import LoRACopies
from eri.layers.lora_products import Gradient, Narrow, lora_down, lora_gradients

__all__ = ["Projection", "project", "side_by_side"]

VECTOR = 8  # elements; tails are multiples of it


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


class Projection:
    """Linear layers, or 1×1 convolutions, with the same input and of one width, as one.

    The weights of the layers move into its memory and become views of it.

    Args:
        layers: frozen; each plain or with a low-rank update that drops nothing.
        tails: whether rows may have one; without, [W; A] is all that is stored. Of many layers
            [W, B] is mostly zeros, and their updates are added by one product of each instead.

    Raises:
        ValueError: the layers have other widths, or their updates other scales.
    """

    @torch.no_grad()
    def __init__(self, layers: Sequence[nn.Module], *, tails: bool = True) -> None:
        bases = [base_of(layer) for layer in layers]
        weights = [base.weight.flatten(1) for base in bases]
        if len({weight.shape for weight in weights}) > 1:
            raise ValueError(f"Projection: shapes differ: {[list(w.shape) for w in weights]}")
        self.layers = list(layers)
        self.count = len(layers)
        self.width, self.inputs = weights[0].shape  # of a layer
        ranks = [layer.rank for layer in layers if isinstance(layer, LoRALayer)]
        self.rank = -(-max(ranks, default=0) // VECTOR) * VECTOR  # each layer's columns of H
        self.ranks = self.count * self.rank
        self.tail = self.ranks if tails else 0
        outputs = self.count * self.width
        self.matrix = weights[0].new_zeros(outputs + self.ranks, self.inputs + self.tail)
        self.up = self.matrix.new_zeros(self.ranks, self.width)  # Bᵀ of each
        for base, weight, start in zip(bases, weights, self._starts(), strict=True):
            place = self.matrix[start : start + self.width, : self.inputs]
            place.copy_(weight)
            base.weight.data = place.unflatten(1, base.weight.shape[1:])
        self.bias = _side_by_side_bias(bases)
        for layer in layers:
            if isinstance(layer, LoRALayer):
                layer.copied_by = self
        self._copied: list[int] = []

    @torch.no_grad()
    def release(self) -> None:
        """Give the layers weights with memory of their own; afterwards it is of no use."""
        for layer in self.layers:
            weight = base_of(layer).weight
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)
            if isinstance(layer, LoRALayer):
                layer.copied_by = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of the updates that are not merged: A and B of each."""
        return [
            matrix.weight for _, layer in self._updates() for matrix in (layer.lora_a, layer.lora_b)
        ]

    @property
    def weight(self) -> Tensor:
        """W, `[ΣN, K]`."""
        return self.matrix[: self.count * self.width, : self.inputs]

    def copies(self) -> Iterator[MatrixCopy]:
        """What of the adapters has to be where, for the products to be right."""
        for place, layer in self._updates():
            # detached: a graph that copies hold would tie a later backward pass to this stream
            a = layer.lora_a.weight.detach().flatten(1)
            b = layer.lora_b.weight.detach().flatten(1)
            row, first = place * self.width, place * self.rank
            below = self.matrix[self.count * self.width + first :, : self.inputs]
            beside = self.matrix[row : row + self.width, self.inputs + first :]
            yield MatrixCopy(a, below[: layer.rank])
            yield MatrixCopy(b.T, self.up[first : first + layer.rank])
            if self.tail:
                yield MatrixCopy(b, beside[:, : layer.rank])

    def of_input(self) -> Narrow | None:
        """What makes H of x; None where no layer has an update."""
        if not self._is_adapted():
            return None
        return Narrow(self.matrix[self.count * self.width :, : self.inputs], 1, self._scale())

    def of_gradient(self) -> Narrow | None:
        """What makes P of dy."""
        return Narrow(self.up, self.count, self._scale()) if self._is_adapted() else None

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Run the layers.

        Args:
            x: `[T, K]`, or with a tail, which is filled unless H is there.
            h: H `[T, n·r]`, if whoever made x made it, too, and filled the tail.

        Returns:
            y `[T, ΣN]`, and H.
        """
        narrow = self.of_input()
        if narrow is None:
            return F.linear(x[:, : self.inputs], self.weight, self.bias), None
        h, outputs = lora_down(x, *narrow) if h is None else h, self.count * self.width
        if x.shape[1] > self.inputs:
            return F.linear(x, self.matrix[:outputs], self.bias), h
        return self._add_updates(F.linear(x, self.weight, self.bias), h), h

    def narrow(self, dy: Tensor) -> Tensor | None:
        """P `[T, n·r]` of dy `[T, ΣN + tail]`, whose tail is filled, or `[T, ΣN]`."""
        narrow = self.of_gradient()
        return None if narrow is None else lora_down(dy, *narrow)

    def backward(self, dy: Tensor, p: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The gradient of x, and P, which is made of dy unless whoever made that did; `narrow`."""
        outputs = self.count * self.width
        p = self.narrow(dy) if p is None else p
        if p is None:
            return dy[:, :outputs] @ self.weight, None
        if dy.shape[1] > outputs:
            return dy @ self.matrix[:, : self.inputs], p
        return (dy @ self.weight).addmm_(p, self.matrix[outputs:, : self.inputs]), p

    def totals(self) -> tuple[Tensor, Tensor] | None:
        """The parameters' gradients, of A `[n·r, K]` and of B `[n, N, r]`, zeros if there are none
        yet; None where a layer has no update, or they lie apart.
        """
        layers = [layer for _, layer in self._updates()]
        if len(layers) < self.count:
            return None
        down = side_by_side([_grad(layer.lora_a.weight) for layer in layers])
        up = side_by_side([_grad(layer.lora_b.weight) for layer in layers])
        return None if down is None or up is None else (down.flatten(0, 1), up)

    def gradients(
        self, dy: Tensor | None, x: Tensor | None, p: Tensor | None, h: Tensor | None
    ) -> list[Gradient]:
        """What `lora_gradients` adds to the gradients of the updates.

        Args:
            dy: `[T, ΣN]`, or with a tail; None: those of B, in `totals`, are added already.
            x: `[T, K]`, or with a tail; None: those of A are.
            p: what `narrow` gave.
            h: what `forward` gave beside y.
        """
        if p is None or h is None:
            return []
        outputs = 0 if dy is None else self.width
        dy = p[:, :0] if dy is None else dy[:, : self.count * self.width]
        inputs = 0 if x is None else self.inputs
        x = p[:, :0] if x is None else x[:, : self.inputs]
        if (totals := self.totals()) is not None:
            down, up = totals
            return [Gradient(dy, x, p, h, down[:, :inputs], up[:, :outputs])]
        updates = list(self._updates())
        downs = [_grad(layer.lora_a.weight) for _, layer in updates]
        ups = [_grad(layer.lora_b.weight) for _, layer in updates]
        found = []
        for (place, _), down, up in zip(updates, downs, ups, strict=True):
            own = slice(place * self.rank, (place + 1) * self.rank)
            part = dy[:, place * self.width : (place + 1) * self.width]
            found.append(Gradient(part, x, p[:, own], h[:, own], down, up[None]))
        return found

    def _add_updates(self, y: Tensor, h: Tensor) -> Tensor:
        """y and what the layers' updates make of their parts of H; in place."""
        if self.count == 1:
            return y.addmm_(h, self.up)
        each, parts = (rows.unflatten(1, (self.count, -1)).transpose(0, 1) for rows in (y, h))
        each.baddbmm_(parts, self.up.unflatten(0, (self.count, -1)))
        return y

    def _is_adapted(self) -> bool:
        """Whether there is an update; the copies of its matrices are those of now."""
        if self.ranks == 0:
            return False
        state = [
            matrix.weight._version for _, layer in self._updates() for matrix in _pair(layer)
        ] + [layer.merged for layer in self.layers if isinstance(layer, LoRALayer)]
        if state != self._copied:
            self._clear()
            LoRACopies(self.copies())()
            self._copied = state
        return any(True for _ in self._updates())

    def _clear(self) -> None:
        outputs = self.count * self.width
        for part in self.matrix[:outputs, self.inputs :], self.matrix[outputs:], self.up:
            part.zero_()

    def _scale(self) -> float:
        scales = {layer.scale for _, layer in self._updates()}
        if len(scales) > 1:
            raise ValueError(f"Projection: updates have other scales: {sorted(scales)}")
        return scales.pop()

    def _updates(self) -> Iterator[tuple[int, LoRALayer]]:
        """Those of the layers that are adapted and not merged, and which they are."""
        for place, layer in enumerate(self.layers):
            if isinstance(layer, LoRALayer) and not layer.merged:
                yield place, layer

    def _starts(self) -> range:
        return range(0, self.count * self.width, self.width)


def project(x: Tensor, projection: Projection, residual: Tensor | None = None) -> Tensor:
    """Run linear layers on the same input, which is what is kept of them.

    Args:
        x: `[..., K]`.
        projection: the layers; of 1×1 convolutions x are the pixels.
        residual: is added, `[..., ΣN]`.

    Returns:
        Their outputs side by side, `[..., ΣN]`.
    """
    return _Project.apply(x, residual, projection, *projection.parameters)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, projection: Projection, *parameters: Tensor
    ) -> Tensor:
        y, h = projection.forward(x.flatten(0, -2))
        ctx.projection, ctx.others = projection, len(parameters)
        ctx.save_for_backward(x, h)
        y = y.unflatten(0, x.shape[:-1])
        return y if residual is None else y.add_(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, h = ctx.saved_tensors
        dy = grads[0].flatten(0, -2)
        projection, dx = ctx.projection, None
        if ctx.needs_input_grad[0]:
            dx, p = projection.backward(dy)
            dx = dx.view(x.shape)
        else:
            p = projection.narrow(dy)
        lora_gradients(projection.gradients(dy, x.flatten(0, -2), p, h))
        d_residual = grads[0] if ctx.needs_input_grad[1] else None
        return dx, d_residual, None, *[None] * ctx.others


def _side_by_side_bias(layers: Sequence[nn.Linear | nn.Conv2d]) -> Tensor | None:
    """The biases of some layers as one, zeros for one without; None if none has one."""
    if all(layer.bias is None for layer in layers):
        return None
    biases = [
        layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
        for layer in layers
    ]
    return biases[0] if len(biases) == 1 else torch.cat(biases)


def _pair(layer: LoRALayer) -> tuple[nn.Module, nn.Module]:
    return layer.lora_a, layer.lora_b


def _grad(parameter: nn.Parameter) -> Tensor:
    """The gradient of a matrix as `[rows, columns]`, made of zeros if there is none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad.flatten(1)

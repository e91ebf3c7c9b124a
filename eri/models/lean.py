r"""Transformer blocks as one function, which keeps little and fuses what lies between products.

    x₁ = x₀ + attention(norm₁(x₀))
    x₂ = x₁ + attention(norm₂(x₁), context)
    y  = x₂ + feed_forward(norm₃(x₂))

Kept for the backward pass of a block are x₀, x₁ and x₂, the projections q, k, v and what the heads
gave, what goes into the gate, and the narrow H of each projection: 17 times tokens times width.
Norms and gates are computed again on the way. A norm adds the residual before it, that of the
block before included, and on the way back that of the gradient; what norms and gates write has a
tail for the narrow product of the next projection, see `eri.layers.projection`. Norms make that
product themselves (`eri.layers.narrow`), and gates gradients (`eri.layers.geglu_lora`). The context
is projected once for all blocks.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from eri.layers.cross_attention import cross_attention, cross_attention_backward, is_fastest
from eri.layers.geglu import geglu, geglu_backward
from eri.layers.geglu_lora import geglu_backward_lora
from eri.layers.join_rows import join_rows
from eri.layers.layer_norm import layer_norm
from eri.layers.lora_products import Gradient, Narrow, lora_gradients
from eri.layers.narrow import add_layer_norm_narrow, join_rows_narrow, layer_norm_backward_narrow
from eri.layers.projection import Projection
from eri.layers.sdpa import Kept, sdpa, sdpa_backward

__all__ = ["RECOMPUTE", "BlockParts", "Recompute", "StackParts", "transformer_blocks"]

Recompute = Literal["nothing", "feed-forward", "projections", "blocks"]
"""What of a transformer block the backward pass computes again instead of keeping: what goes into
the gate; the queries, keys and values as well; the whole block."""

RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)
"""From the most memory to the least."""


@dataclass(frozen=True)
class BlockParts:
    """A transformer block's frozen layers, adapted or not."""

    norms: Sequence[nn.LayerNorm]  # before each of the three
    heads: int
    self_in: Projection  # to queries, keys and values
    self_out: Projection
    cross_q: Projection
    cross_out: Projection
    ff_in: Projection  # to values and gates
    ff_out: Projection

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All of them, in the order in which they run."""
        attention = self.self_in, self.self_out, self.cross_q, self.cross_out
        return *attention, self.ff_in, self.ff_out


@dataclass(frozen=True)
class StackParts:
    """Transformer blocks of one width, which run one after the other."""

    blocks: Sequence[BlockParts]
    words: Projection  # of the context, to the keys and the values of each block

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All of them."""
        return self.words, *(one for block in self.blocks for one in block.projections)


class _Trace(NamedTuple):
    """What a block's forward pass leaves; None is computed again. T = batch times tokens.

    A norm leaves its means and deviations, an attention what its kernel keeps.
    """

    x1: Tensor  # [T, D]
    x2: Tensor
    moments: tuple[Tensor, Tensor, Tensor]  # [T, 2] of each norm
    self_o: Tensor  # [T, D]
    self_kept: Kept
    cross_o: Tensor  # [T, D], or with a tail
    cross_kept: Kept | None  # None: the kernel for few keys ran, which keeps nothing
    hidden: tuple[Tensor | None, ...]  # H of each projection
    self_qkv: Tensor | None  # [T, 3·D]
    cross_q: Tensor | None  # [T, D]
    u: Tensor | None  # into the gate


class _Run(NamedTuple):
    """What the forward pass leaves."""

    x0: list[Tensor]  # [T, D], of each block
    traces: list[_Trace | None]
    h_words: Tensor | None  # H of the context
    kv: Tensor | None  # [B·S, n·2·D]


def transformer_blocks(
    x: Tensor, context: Tensor, parts: StackParts, recompute: Recompute = "nothing"
) -> Tensor:
    """Run blocks whose norms and weights are frozen.

    Args:
        x: `[B, T, D]`.
        context: `[B, S, K]`.
        parts: of the blocks.
        recompute: what the backward pass computes again.
    """
    parameters = (p for projection in parts.projections for p in projection.parameters)
    return _Blocks.apply(x, context, parts, recompute, *parameters)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        context: Tensor,
        parts: StackParts,
        recompute: Recompute,
        *parameters: Tensor,
    ) -> Tensor:
        kv, h_words = parts.words.forward(context.flatten(0, 1))
        run = _Run([], [], h_words, kv if recompute in {"nothing", "feed-forward"} else None)
        x2, y = x.flatten(0, 1), None
        for block, words in zip(parts.blocks, _of_each(parts, kv, len(x)), strict=True):
            x0, x2, y, trace = _forward(block, x2, y, words)
            run.x0.append(x0)
            run.traces.append(_reduced(trace, recompute))
        ctx.parts, ctx.shape, ctx.others = parts, x.shape, 2 + len(parameters)
        tensors, ctx.rebuild = _taken_apart(run)
        ctx.save_for_backward(context, *tensors)
        return (x2 if y is None else y.add_(x2)).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        context, *tensors = ctx.saved_tensors
        parts, run, batch = ctx.parts, ctx.rebuild(tensors), len(context)
        needs_dx, needs_d_context, *_ = ctx.needs_input_grad
        context_rows = context.flatten(0, 1)
        kv = parts.words.forward(context_rows)[0] if run.kv is None else run.kv
        d_kv = torch.empty_like(kv)
        each = parts.blocks, (None, *parts.blocks[:-1]), run.x0, run.traces
        words = (_of_each(parts, rows, batch) for rows in (kv, d_kv))
        of_blocks = zip(*each, *words, strict=True)
        dx, last = None, parts.blocks[-1].ff_out
        g, p = join_rows_narrow([grads[0].flatten(0, 1)], last.of_gradient())
        for block, before, x0, trace, words, d_words in reversed(list(of_blocks)):
            if trace is None:
                *_, trace = _forward(block, x0, None, words)
            back = _WayBack(block, x0, words, trace)
            g, p = back.feed_forward(g, p)
            g, p = back.cross_attention(g, p, d_words)
            if before is not None:
                g, p = back.self_attention(g, p, before.ff_out.of_gradient())
            elif needs_dx:
                dx = back.self_attention(g, p, None)[0].view(ctx.shape)
            else:
                back.end_self_attention(g, p)
        d_context, p = None, parts.words.narrow(d_kv)
        if needs_d_context:
            d_context, p = parts.words.backward(d_kv)
            d_context = d_context.view(context.shape)
        lora_gradients(parts.words.gradients(d_kv, context_rows, p, run.h_words))
        return dx, d_context, *[None] * ctx.others


def _forward(
    parts: BlockParts, x: Tensor, y: Tensor | None, words: Tensor
) -> tuple[Tensor, Tensor, Tensor, _Trace]:
    """Run a block.

    Args:
        parts: of the block.
        x: rows `[T, D]`.
        y: what is still to be added to them; None: nothing.
        words: keys and values of the context, `[B, S, 2·D]`.

    Returns:
        x₀; x₂, and what is still to be added to it; the trace.
    """
    batch = len(words)
    if y is None:
        x0, (n, moments1), h = x, layer_norm(x, parts.norms[0], parts.self_in.tail), None
    else:
        x0, n, moments1, h = add_layer_norm_narrow(x, y, parts.norms[0], parts.self_in.of_input())
    self_qkv, h_self_in = parts.self_in.forward(n, h)
    self_o, self_kept = _attend(*_heads(self_qkv, batch, 3, parts.heads))
    y, h_self_out = parts.self_out.forward(*join_rows_narrow([self_o], parts.self_out.of_input()))
    x1, n, moments2, h = add_layer_norm_narrow(x0, y, parts.norms[1], parts.cross_q.of_input())
    cross_q, h_cross_q = parts.cross_q.forward(n, h)
    cross_o, cross_kept = _attend_words(parts, cross_q, words)
    y, h_cross_out = parts.cross_out.forward(cross_o)
    x2, n, moments3, h = add_layer_norm_narrow(x1, y, parts.norms[2], parts.ff_in.of_input())
    u, h_ff_in = parts.ff_in.forward(n, h)
    y, h_ff_out = parts.ff_out.forward(geglu(u, parts.ff_out.tail))
    trace = _Trace(
        x1=x1,
        x2=x2,
        moments=(moments1, moments2, moments3),
        self_o=self_o,
        self_kept=self_kept,
        cross_o=cross_o,
        cross_kept=cross_kept,
        hidden=(h_self_in, h_self_out, h_cross_q, h_cross_out, h_ff_in, h_ff_out),
        self_qkv=self_qkv,
        cross_q=cross_q,
        u=u,
    )
    return x0, x2, y, trace


def _reduced(trace: _Trace, recompute: Recompute) -> _Trace | None:
    """What is kept of it."""
    if recompute == "blocks":
        return None
    if recompute == "projections":
        return trace._replace(u=None, self_qkv=None, cross_q=None)
    return trace._replace(u=None) if recompute == "feed-forward" else trace


class _WayBack:
    """The backward pass of a block, last part first.

    Args:
        parts: of the block.
        x: what went in, rows `[T, D]`.
        words: keys and values of the context, `[B, S, 2·D]`.
        trace: of the forward pass.
    """

    def __init__(self, parts: BlockParts, x: Tensor, words: Tensor, trace: _Trace) -> None:
        self.parts, self.words, self.trace = parts, words, trace
        self.sums = x, trace.x1, trace.x2  # what the norms read
        self.gradients: list[Gradient] = []  # of the attentions' matrices, for one launch

    def feed_forward(self, g: Tensor, p: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """From the gradient of y to that of x2, both with a tail; P of each, if it is there."""
        inner, outer = self.parts.ff_in, self.parts.ff_out
        *_, h_in, h_out = self.trace.hidden
        u = inner.forward(self._norm(2, inner))[0] if self.trace.u is None else self.trace.u
        da, p_out = outer.backward(g, p)
        du, a, p_in = self._through_gate(da, u, p_out, h_in)
        del u, da
        dn, p_in = inner.backward(du, p_in)
        d_sum, n, p = self._through_norm(2, dn, g, self.parts.cross_out.of_gradient())
        of_inner = inner.gradients(None if a is None else du, n, p_in, h_in)
        lora_gradients(of_inner + outer.gradients(g, a, p_out, h_out))
        return d_sum, p

    def _through_gate(
        self, da: Tensor, u: Tensor, p: Tensor | None, h: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The gradient of u, with a tail; a and no P, or no a: gradients that read it are added."""
        inner, narrow = self.parts.ff_in, self.parts.ff_in.of_gradient()
        of_outer, of_inner = self.parts.ff_out.totals(), inner.totals()
        if p is None or h is None or of_outer is None or of_inner is None or narrow is None:
            return *geglu_backward(da, u, inner.tail), None
        d_down, d_up = of_outer[0], of_inner[1][0]
        du, p = geglu_backward_lora(da, u, p, h, d_down, d_up, narrow)
        return du, None, p

    def cross_attention(
        self, g: Tensor, p: Tensor | None, d_words: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """From the gradient of x2 to that of x1, likewise; writes that of the words."""
        parts, trace = self.parts, self.trace
        _, _, h_q, h_out, _, _ = trace.hidden
        q = trace.cross_q
        q = parts.cross_q.forward(self._norm(1, parts.cross_q))[0] if q is None else q
        d_o, p = parts.cross_out.backward(g, p)
        self.gradients += parts.cross_out.gradients(g, trace.cross_o, p, h_out)
        dq = _words_backward(parts, d_o, q, self.words, d_words, trace)
        dn, p_q = parts.cross_q.backward(dq)
        d_sum, n, p = self._through_norm(1, dn, g, parts.self_out.of_gradient())
        self.gradients += parts.cross_q.gradients(dq, n, p_q, h_q)
        return d_sum, p

    def self_attention(
        self, g: Tensor, p: Tensor | None, narrow: Narrow | None
    ) -> tuple[Tensor, Tensor | None]:
        """From the gradient of x1 to that of x, with the tail of a narrow product; and that."""
        parts = self.parts
        d_qkv, p_in = self._through_attention(g, p)
        dn, p_in = parts.self_in.backward(d_qkv, p_in)
        d_sum, n, p = self._through_norm(0, dn, g, narrow)
        self._add_gradients(d_qkv, n, p_in)
        return d_sum, p

    def end_self_attention(self, g: Tensor, p: Tensor | None) -> None:
        """The same where nobody needs the gradient of x."""
        d_qkv, p_in = self._through_attention(g, p)
        self._add_gradients(d_qkv, self._norm(0, self.parts.self_in), p_in)

    def _through_attention(self, g: Tensor, p: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The gradient of queries, keys and values, with a tail, and P of it."""
        parts, trace, batch, heads = self.parts, self.trace, len(self.words), self.parts.heads
        qkv = trace.self_qkv
        qkv = parts.self_in.forward(self._norm(0, parts.self_in))[0] if qkv is None else qkv
        d_o, p = parts.self_out.backward(g, p)
        self.gradients += parts.self_out.gradients(g, trace.self_o, p, trace.hidden[1])
        q, k, v = _heads(qkv, batch, 3, heads)
        o, d_o = _split(trace.self_o, batch, heads), _split(d_o, batch, heads)
        d_heads = sdpa_backward(d_o, q, k, v, o, trace.self_kept)
        return join_rows_narrow([*map(_merged, d_heads)], parts.self_in.of_gradient())

    def _add_gradients(self, d_qkv: Tensor, n: Tensor, p: Tensor | None) -> None:
        """Add those of both attentions' matrices, from the gradient of queries, keys and values."""
        of_in = self.parts.self_in.gradients(d_qkv, n, p, self.trace.hidden[0])
        lora_gradients([*of_in, *self.gradients])

    def _norm(self, which: int, projection: Projection) -> Tensor:
        """What a projection reads, once more."""
        return layer_norm(self.sums[which], self.parts.norms[which], projection.tail)[0]

    def _through_norm(
        self, which: int, dn: Tensor, g: Tensor, narrow: Narrow | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The gradient of a sum from those of its norm and of what it is added to; the norm; P."""
        x, norm, moments = self.sums[which], self.parts.norms[which], self.trace.moments[which]
        return layer_norm_backward_narrow(dn, x, moments, norm, g[:, : x.shape[1]], narrow)


def _of_each(parts: StackParts, kv: Tensor, batch: int) -> list[Tensor]:
    """Of `[B·S, n·2·D]` what belongs to each block, `[B, S, 2·D]`, views."""
    return list(kv.unflatten(0, (batch, -1)).split(2 * parts.words.width, dim=2))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Kept]:
    """What the heads give as rows, and what is kept."""
    o, kept = sdpa(q, k, v)
    return _merged(o), kept


def _attend_words(parts: BlockParts, q: Tensor, words: Tensor) -> tuple[Tensor, Kept | None]:
    """The same of queries `[T, D]` and the context's keys and values, perhaps with a tail."""
    batch, heads = len(words), parts.heads
    queries = q.unflatten(0, (batch, -1))
    if is_fastest(queries, words, heads):
        return cross_attention(queries, words, heads, parts.cross_out.tail), None
    return _attend(_split(q, batch, heads), *_heads(words.flatten(0, 1), batch, 2, heads))


def _words_backward(  # noqa: PLR0917
    parts: BlockParts, d_o: Tensor, q: Tensor, words: Tensor, d_words: Tensor, trace: _Trace
) -> Tensor:
    """The gradient of q, with a tail; writes that of the words."""
    batch, heads, tail = len(words), parts.heads, parts.cross_q.tail
    if trace.cross_kept is None:
        queries, gradients = (rows.unflatten(0, (batch, -1)) for rows in (q, d_o))
        return cross_attention_backward(gradients, queries, words, d_words, heads, tail)
    k, v = _heads(words.flatten(0, 1), batch, 2, heads)
    q, o, d_o = (_split(rows, batch, heads) for rows in (q, trace.cross_o, d_o))
    dq, *d_pair = sdpa_backward(d_o, q, k, v, o, trace.cross_kept)
    for own, found in zip(_heads(d_words.flatten(0, 1), batch, 2, heads), d_pair, strict=True):
        own.copy_(found)
    return join_rows([_merged(dq)], tail)


def _heads(rows: Tensor, batch: int, count: int, heads: int) -> tuple[Tensor, ...]:
    """Projections side by side `[B·T, n·H·D]` to n of `[B, H, T, D]`, views."""
    parts = rows.unflatten(0, (batch, -1)).unflatten(2, (count, heads, -1)).unbind(2)
    return tuple(part.transpose(1, 2) for part in parts)


def _split(rows: Tensor, batch: int, heads: int) -> Tensor:
    return _heads(rows, batch, 1, heads)[0]


def _merged(o: Tensor) -> Tensor:
    """`[B, H, T, D]` to rows `[B·T, H·D]`; a view, as kernels leave it."""
    return o.transpose(1, 2).flatten(2).flatten(0, 1)


def _taken_apart(run: _Run) -> tuple[list[Tensor], Any]:
    """Its tensors, which autograd keeps, and what puts them back into it."""
    leaves, tree = tree_flatten(run)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def rebuild(tensors: Sequence[Tensor]) -> Any:
        filled = list(others)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return tree_unflatten(filled, tree)

    return [leaves[place] for place in places], rebuild

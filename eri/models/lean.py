r"""A transformer block as one function, which keeps little and fuses what lies between products.

    x₁ = x₀ + attention(norm₁(x₀))
    x₂ = x₁ + attention(norm₂(x₁), context)
    y  = x₂ + feed_forward(norm₃(x₂))

Kept for the backward pass are x₀, x₁ and x₂, the projections q, k, v and what the heads gave, what
goes into the gate, and the narrow H of each projection: 17 times tokens times width. Norms and
gates are computed again on the way. A norm adds the residual before it, forward and backward, and
what norms and gates write has a tail for the low-rank update of the projection that reads it next;
see `eri.layers.projection`.

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
from eri.layers.join_rows import join_rows
from eri.layers.layer_norm import add_layer_norm, layer_norm, layer_norm_backward
from eri.layers.projection import Projection
from eri.layers.sdpa import Kept, sdpa, sdpa_backward

__all__ = ["RECOMPUTE", "BlockParts", "Recompute", "transformer_block"]

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
    cross_kv: Projection  # of the context
    cross_out: Projection
    ff_in: Projection  # to values and gates
    ff_out: Projection

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All of them, in the order in which they run."""
        attention = self.self_in, self.self_out, self.cross_q, self.cross_kv, self.cross_out
        return *attention, self.ff_in, self.ff_out


class _Trace(NamedTuple):
    """What a forward pass leaves; None is computed again. T = batch times tokens, h: see H above.

    A norm leaves its means and deviations, an attention what its kernel keeps.
    """

    x1: Tensor  # [T, D]
    x2: Tensor
    moments: tuple[Tensor, Tensor, Tensor]  # [T, 2] of each norm
    self_o: Tensor  # [T, D]
    self_kept: Kept
    cross_o: Tensor  # [T, D]
    cross_kept: Kept | None  # None: the kernel for few keys ran, which keeps nothing
    hidden: tuple[Tensor | None, ...]  # of each projection
    self_qkv: Tensor | None = None  # [T, 3·D]
    cross_q: Tensor | None = None  # [T, D]
    cross_kv: Tensor | None = None  # [B·S, 2·D]
    u: Tensor | None = None  # into the gate


def transformer_block(
    x: Tensor, context: Tensor, parts: BlockParts, recompute: Recompute = "nothing"
) -> Tensor:
    """Run a block whose norms and weights are frozen.

    Args:
        x: `[B, T, D]`.
        context: `[B, S, K]`.
        parts: of the block.
        recompute: what the backward pass computes again.
    """
    parameters = (p for projection in parts.projections for p in projection.parameters)
    return _Block.apply(x, context, parts, recompute, *parameters)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        context: Tensor,
        parts: BlockParts,
        recompute: Recompute,
        *parameters: Tensor,
    ) -> Tensor:
        y, trace = _forward(parts, x, context)
        ctx.parts, ctx.others = parts, 2 + len(parameters)
        if recompute == "feed-forward":
            trace = trace._replace(u=None)
        elif recompute == "projections":
            trace = trace._replace(u=None, self_qkv=None, cross_q=None, cross_kv=None)
        tensors, ctx.rebuild = _taken_apart(None if recompute == "blocks" else trace)
        ctx.save_for_backward(x, context, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, context, *tensors = ctx.saved_tensors
        trace = ctx.rebuild(tensors)
        if trace is None:
            _, trace = _forward(ctx.parts, x, context)
        needs_dx, needs_d_context, *_ = ctx.needs_input_grad
        back = _WayBack(ctx.parts, x.flatten(0, 1), context.flatten(0, 1), len(x), trace)
        g = join_rows([grads[0].flatten(0, 1)], ctx.parts.ff_out.tail)
        g = back.feed_forward(g)
        g, d_words = back.cross_attention(g, needs_d_context)
        dx = back.self_attention(g, needs_dx)
        given = zip((dx, d_words), (x, context), strict=True)
        return *[None if d is None else d.view(like.shape) for d, like in given], *[
            None
        ] * ctx.others


def _forward(parts: BlockParts, x: Tensor, context: Tensor) -> tuple[Tensor, _Trace]:
    batch = len(x)
    x0 = x.flatten(0, 1)
    n, moments1 = layer_norm(x0, parts.norms[0], parts.self_in.tail)
    self_qkv, h_self_in = parts.self_in.forward(n)
    self_o, self_kept = _attend(*_heads(self_qkv, batch, 3, parts.heads))
    y, h_self_out = parts.self_out.forward(self_o)
    x1, n, moments2 = add_layer_norm(x0, y, parts.norms[1], parts.cross_q.tail)
    cross_q, h_cross_q = parts.cross_q.forward(n)
    cross_kv, h_cross_kv = parts.cross_kv.forward(context.flatten(0, 1))
    cross_o, cross_kept = _attend_words(cross_q, cross_kv, batch, parts.heads)
    y, h_cross_out = parts.cross_out.forward(cross_o)
    x2, n, moments3 = add_layer_norm(x1, y, parts.norms[2], parts.ff_in.tail)
    u, h_ff_in = parts.ff_in.forward(n)
    y, h_ff_out = parts.ff_out.forward(geglu(u, parts.ff_out.tail))
    hidden = h_self_in, h_self_out, h_cross_q, h_cross_kv, h_cross_out, h_ff_in, h_ff_out
    trace = _Trace(
        x1,
        x2,
        (moments1, moments2, moments3),
        self_o,
        self_kept,
        cross_o,
        cross_kept,
        hidden,
        self_qkv,
        cross_q,
        cross_kv,
        u,
    )
    return y.add_(x2).view(x.shape), trace


class _WayBack:
    """The backward pass of a block, last part first.

    Args:
        parts: of the block.
        x: what went in, rows `[T, D]`.
        words: the context, rows.
        batch: B.
        trace: of the forward pass.
    """

    def __init__(
        self, parts: BlockParts, x: Tensor, words: Tensor, batch: int, trace: _Trace
    ) -> None:
        self.parts, self.words, self.batch, self.trace = parts, words, batch, trace
        self.sums = x, trace.x1, trace.x2  # what the norms read

    def feed_forward(self, g: Tensor) -> Tensor:
        """From the gradient of y to that of x2, both with a tail."""
        inner, outer = self.parts.ff_in, self.parts.ff_out
        *_, h_in, h_out = self.trace.hidden
        u = inner.forward(self._norm(2, inner))[0] if self.trace.u is None else self.trace.u
        da, p_out = outer.backward(g)
        du, a = geglu_backward(da, u, inner.tail)
        del u, da
        outer.add_gradients(g, a, p_out, h_out)
        del a
        dn, p = inner.backward(du)
        d_sum, n = self._through_norm(2, dn, g, self.parts.cross_out.tail)
        inner.add_gradients(du, n, p, h_in)
        return d_sum

    def cross_attention(self, g: Tensor, needs_d_words: bool) -> tuple[Tensor, Tensor | None]:
        """From the gradient of x2 to that of x1, with tails; and that of the context."""
        parts, trace = self.parts, self.trace
        _, _, h_q, h_kv, h_out, _, _ = trace.hidden
        q, kv = trace.cross_q, trace.cross_kv
        q = parts.cross_q.forward(self._norm(1, parts.cross_q))[0] if q is None else q
        kv = parts.cross_kv.forward(self.words)[0] if kv is None else kv
        d_o, p = parts.cross_out.backward(g)
        parts.cross_out.add_gradients(g, trace.cross_o, p, h_out)
        dq, dkv = _words_backward(parts, self.batch, d_o, q, kv, trace)
        d_words, p = None, parts.cross_kv.narrow(dkv)
        if needs_d_words:
            d_words, p = parts.cross_kv.backward(dkv)
        parts.cross_kv.add_gradients(dkv, self.words, p, h_kv)
        dn, p = parts.cross_q.backward(dq)
        d_sum, n = self._through_norm(1, dn, g, parts.self_out.tail)
        parts.cross_q.add_gradients(dq, n, p, h_q)
        return d_sum, d_words

    def self_attention(self, g: Tensor, needs_dx: bool) -> Tensor | None:
        """From the gradient of x1, with a tail, to that of x, where it is needed."""
        parts, trace, batch, heads = self.parts, self.trace, self.batch, self.parts.heads
        h_in, h_out, *_ = trace.hidden
        qkv = trace.self_qkv
        qkv = parts.self_in.forward(self._norm(0, parts.self_in))[0] if qkv is None else qkv
        d_o, p = parts.self_out.backward(g)
        parts.self_out.add_gradients(g, trace.self_o, p, h_out)
        q, k, v = _heads(qkv, batch, 3, heads)
        o, d_o = _split(trace.self_o, batch, heads), _split(d_o, batch, heads)
        d_heads = sdpa_backward(d_o, q, k, v, o, trace.self_kept)
        d_qkv = join_rows([*map(_merged, d_heads)], parts.self_in.tail)
        dx = None
        if needs_dx:
            dn, p = parts.self_in.backward(d_qkv)
            dx, n = self._through_norm(0, dn, g)
        else:
            n, p = self._norm(0, parts.self_in), parts.self_in.narrow(d_qkv)
        parts.self_in.add_gradients(d_qkv, n, p, h_in)
        return dx

    def _norm(self, which: int, projection: Projection) -> Tensor:
        """What a projection reads, once more."""
        return layer_norm(self.sums[which], self.parts.norms[which], projection.tail)[0]

    def _through_norm(
        self, which: int, dn: Tensor, g: Tensor, tail: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The gradient of a sum from those of its norm and of what it is added to; and the norm."""
        x, norm, moments = self.sums[which], self.parts.norms[which], self.trace.moments[which]
        return layer_norm_backward(dn, x, moments, norm, g[:, : x.shape[1]], tail)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Kept]:
    """What the heads give as rows, and what is kept."""
    o, kept = sdpa(q, k, v)
    return _merged(o), kept


def _attend_words(q: Tensor, kv: Tensor, batch: int, heads: int) -> tuple[Tensor, Kept | None]:
    """The same of queries `[B·T, D]` and the context's keys and values `[B·S, 2·D]`."""
    queries, words = q.unflatten(0, (batch, -1)), kv.unflatten(0, (batch, -1))
    if is_fastest(queries, words, heads):
        return cross_attention(queries, words, heads).flatten(0, 1), None
    return _attend(_split(q, batch, heads), *_heads(kv, batch, 2, heads))


def _words_backward(  # noqa: PLR0917
    parts: BlockParts, batch: int, d_o: Tensor, q: Tensor, kv: Tensor, trace: _Trace
) -> tuple[Tensor, Tensor]:
    """The gradients of q, with a tail, and of kv."""
    heads, tail = parts.heads, parts.cross_q.tail
    if trace.cross_kept is None:
        queries, words, gradients = (rows.unflatten(0, (batch, -1)) for rows in (q, kv, d_o))
        dq, dkv = cross_attention_backward(gradients, queries, words, heads, tail)
        return dq, dkv.flatten(0, 1)
    k, v = _heads(kv, batch, 2, heads)
    q, o, d_o = (_split(rows, batch, heads) for rows in (q, trace.cross_o, d_o))
    dq, dk, dv = sdpa_backward(d_o, q, k, v, o, trace.cross_kept)
    return join_rows([_merged(dq)], tail), join_rows([_merged(dk), _merged(dv)])


def _heads(rows: Tensor, batch: int, count: int, heads: int) -> tuple[Tensor, ...]:
    """Projections side by side `[B·T, n·H·D]` to n of `[B, H, T, D]`, views."""
    parts = rows.unflatten(0, (batch, -1)).unflatten(2, (count, heads, -1)).unbind(2)
    return tuple(part.transpose(1, 2) for part in parts)


def _split(rows: Tensor, batch: int, heads: int) -> Tensor:
    return _heads(rows, batch, 1, heads)[0]


def _merged(o: Tensor) -> Tensor:
    """`[B, H, T, D]` to rows `[B·T, H·D]`; a view, as kernels leave it."""
    return o.transpose(1, 2).flatten(2).flatten(0, 1)


def _taken_apart(trace: _Trace | None) -> tuple[list[Tensor | None], Any]:
    """The tensors of a trace, which autograd keeps, and what puts them back into it."""
    leaves, tree = tree_flatten(trace)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def rebuild(tensors: Sequence[Tensor]) -> Any:
        filled = list(others)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        return tree_unflatten(filled, tree)

    return [leaves[place] for place in places], rebuild

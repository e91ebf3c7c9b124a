r"""Attention to few keys, such as those of a prompt, forward and backward, keeping only its inputs.

$$o = P v,\quad P = \operatorname{softmax}(s\,q k^\top),\quad s = D^{-1/2}$$

for each of the heads, whose size is D, and with $dP = do\,v^\top$ and $dS = P \circ (dP - \Delta)$,
where $\Delta$ are the sums of the rows of $P \circ dP$,

$$dq = s\,dS\,k,\quad dk = s\,dS^\top q,\quad dv = P^\top do$$

A block of threads has the keys and values of a head in shared memory and the scores of its queries
in registers, where the softmax runs in float32. The backward pass works P out again, so neither o
nor anything about P is kept. Queries are read and results written once: 4 bytes an element in 16
bits forward, 6 backward. Gradients of keys and values are added up over a strip of queries in
registers; the strips' sums are written in float32 and added in a fixed order.

Sources: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, section 3.2; Dao,
"FlashAttention-2", arXiv 2307.08691, section 3, for the order of the backward pass.

Limits of the kernels: sm_80 or newer; float16 or bfloat16; heads of 40, 64, 80 or 160; 1 to 256
keys. Queries that are not contiguous are copied, and keys that are not in rows at one stride. With
up to 80 keys and heads of up to 80 the backward pass is one kernel and a sum; otherwise there is a
kernel more, and P is worked out three times: with 231 keys and heads of 64, cuDNN's attention is
the faster one on an H200.

Measured with `pytest -s -m gpu tests/layers/test_cross_attention.py -k bandwidth`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from eri.layers.backend import kernels_ready, use_kernel
from eri.layers.vectors import aligned_rows, type_name, unsupported_tail, with_tail

__all__ = [
    "attend",
    "cross_attention",
    "cross_attention_backward",
    "cross_attention_backward_reference",
    "cross_attention_reference",
    "is_fastest",
    "unsupported",
]

SIZES = (40, 64, 80, 160)  # of a head
MOST_KEYS = 256
FEW_KEYS = 80  # on an H200 cuDNN is faster with 231
MOST_ELEMENTS = 2**31  # of the queries, tails included, and of keys with values


def cross_attention_reference(q: Tensor, kv: Tensor, heads: int) -> Tensor:
    """What `cross_attention` is, in PyTorch's own operations."""
    queries, keys, values = _heads(q, kv, heads)
    return _rows(_weights(queries, keys) @ values)


def cross_attention_backward_reference(
    d_o: Tensor, q: Tensor, kv: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """What `cross_attention_backward` is, in PyTorch's own operations; dq is like q."""
    queries, keys, values = _heads(q, kv, heads)
    scale = queries.shape[-1] ** -0.5
    (gradients,) = _split(d_o, heads, 1)
    weights = _weights(queries, keys)
    d_weights = gradients @ values.mT
    slopes = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))
    d_keys = (slopes.mT @ queries) * scale
    d_values = weights.mT @ gradients
    return _rows((slopes @ keys) * scale), torch.cat([_rows(d_keys), _rows(d_values)], dim=-1)


def _weights(queries: Tensor, keys: Tensor) -> Tensor:
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.mT
    kept = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=kept).to(scores.dtype)


def _heads(q: Tensor, kv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = _split(kv, heads, 2)
    return _split(q, heads, 1)[0], keys, values


def _split(rows: Tensor, heads: int, parts: int) -> tuple[Tensor, ...]:
    """`parts` times `[B, H, T, D]` of rows `[B, T, parts·H·D]`."""
    return rows.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def _rows(parts: Tensor) -> Tensor:
    """`[B, H, T, D]` to `[B, T, H·D]`."""
    return parts.transpose(1, 2).flatten(2)


def unsupported(q: Tensor, kv: Tensor, heads: int, tail: int = 0) -> str | None:
    """Why the kernels cannot take q, kv and so many heads, in words; None where they can."""
    if q.dtype not in {torch.float16, torch.bfloat16}:
        return f"q is {type_name(q.dtype)}, not float16 or bfloat16"
    if kv.dtype != q.dtype:
        return f"q is {type_name(q.dtype)}, and kv {type_name(kv.dtype)}"
    if q.shape[-1] // heads not in SIZES:
        sizes = ", ".join(map(str, SIZES))
        return f"heads have {q.shape[-1] // heads} numbers, not one of {sizes}"
    if not 0 < kv.shape[1] <= MOST_KEYS:
        return f"there are {kv.shape[1]} keys, not 1 to {MOST_KEYS}"
    rows, words = q.shape[0] * q.shape[1], kv.shape[0] * kv.shape[1]
    for name, elements in ("q", rows * (q.shape[2] + tail)), ("kv", words * 2 * q.shape[2]):
        if not 0 < elements < MOST_ELEMENTS:
            return f"{name} has {elements} elements, not 1 to {MOST_ELEMENTS - 1}"
    return unsupported_tail(tail, q)


def is_fastest(q: Tensor, kv: Tensor, heads: int) -> bool:
    """Whether to use the kernels: they take these, and there are not so many keys that PyTorch's
    own attention is faster. Keys alone say as much as keys and values.
    """
    few = kv.shape[1] <= FEW_KEYS and kernels_ready(q.device)
    return few and unsupported(q, kv, heads) is None


LIBRARY = Library("eri", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define("cross_attention(Tensor q, Tensor kv, int heads, int tail) -> Tensor", tags=TAGS)
LIBRARY.define(
    "cross_attention_backward(Tensor d_o, Tensor q, Tensor kv, Tensor(a!) dkv, int heads, int tail)"
    " -> Tensor",
    tags=TAGS,
)


@torch.library.impl(LIBRARY, "cross_attention", "CPU")
def _cross_attention_on_cpu(q: Tensor, kv: Tensor, heads: int, tail: int) -> Tensor:
    return with_tail(cross_attention_reference(q, kv, heads), tail).contiguous()


@torch.library.impl(LIBRARY, "cross_attention_backward", "CPU")
def _cross_attention_backward_on_cpu(  # noqa: PLR0917 - the signature of the op
    d_o: Tensor, q: Tensor, kv: Tensor, dkv: Tensor, heads: int, tail: int
) -> Tensor:
    dq, found = cross_attention_backward_reference(d_o, q, kv, heads)
    dkv.copy_(found)
    return with_tail(dq, tail).contiguous()


@torch.library.register_fake("eri::cross_attention", lib=LIBRARY)
def _cross_attention_fake(q: Tensor, kv: Tensor, heads: int, tail: int) -> Tensor:
    return q.new_empty((q.shape[0] * q.shape[1], q.shape[2] + tail))


@torch.library.register_fake("eri::cross_attention_backward", lib=LIBRARY)
def _cross_attention_backward_fake(  # noqa: PLR0917 - the signature of the op
    d_o: Tensor, q: Tensor, kv: Tensor, dkv: Tensor, heads: int, tail: int
) -> Tensor:
    return q.new_empty((q.shape[0] * q.shape[1], q.shape[2] + tail))


def cross_attention(q: Tensor, kv: Tensor, heads: int, tail: int = 0) -> Tensor:
    """Attend from q `[B, T, H·D]` to kv `[B, S, 2·H·D]`, without a gradient of its own.

    Args:
        q: the queries of all heads side by side.
        kv: the keys of all heads, and behind them the values; rows may lie further apart.
        heads: H.
        tail: numbers behind each row of the result that are not written.

    Returns:
        `[B·T, H·D + tail]`.

    Raises:
        ValueError: shapes do not fit each other.
        ConfigError: the backend is `cuda` and the kernel cannot be used.
    """
    _check(q, kv, heads)
    if use_kernel("cross_attention", q.device, lambda: unsupported(q, kv, heads, tail)):
        return torch.ops.eri.cross_attention(_dense(q), aligned_rows(kv), heads, tail)
    return with_tail(cross_attention_reference(q, kv, heads), tail)


def cross_attention_backward(  # noqa: PLR0917 - the signature of the op
    d_o: Tensor, q: Tensor, kv: Tensor, dkv: Tensor, heads: int, tail: int = 0
) -> Tensor:
    """The gradients of q and kv.

    Args:
        d_o: of what `cross_attention` gave, with the rows of q.
        q: its input.
        kv: its input.
        dkv: like kv; is written.
        heads: the same.
        tail: numbers behind each row of dq that are not written.

    Returns:
        dq `[B·T, H·D + tail]`.

    Raises:
        ValueError: shapes do not fit each other.
        ConfigError: the backend is `cuda` and the kernel cannot be used.
    """
    _check(q, kv, heads)
    d_o = d_o.view(q.shape)
    if use_kernel("cross_attention", q.device, lambda: unsupported(q, kv, heads, tail)):
        written = aligned_rows(dkv)
        dq = torch.ops.eri.cross_attention_backward(
            _dense(d_o), _dense(q), aligned_rows(kv), written, heads, tail
        )
        if written is not dkv:
            dkv.copy_(written)
        return dq
    dq, found = cross_attention_backward_reference(d_o, q, kv, heads)
    dkv.copy_(found)
    return with_tail(dq, tail)


def attend(q: Tensor, kv: Tensor, heads: int) -> Tensor:
    """`cross_attention` with gradients; one that is differentiated again is PyTorch's own.

    Args:
        q: `[B, T, H·D]`.
        kv: `[B, S, 2·H·D]`.
        heads: H.

    Returns:
        `[B, T, H·D]`.

    Raises:
        ValueError: shapes do not fit each other.
        ConfigError: the backend is `cuda` and the kernel cannot be used.
    """
    return _Attend.apply(q, kv, heads)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, heads: int) -> Tensor:
        ctx.save_for_backward(q, kv)
        ctx.heads = heads
        return cross_attention(q, kv, heads).view(q.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, kv = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is differentiated, too
            return *cross_attention_backward_reference(grads[0], q, kv, ctx.heads), None
        dkv = torch.empty_like(kv, memory_format=torch.contiguous_format)
        dq = cross_attention_backward(grads[0], q, kv, dkv, ctx.heads)
        return dq.view(q.shape), dkv, None


def _dense(rows: Tensor) -> Tensor:
    return aligned_rows(rows.contiguous())


def _check(q: Tensor, kv: Tensor, heads: int) -> None:
    if q.ndim != 3 or kv.ndim != 3 or kv.shape[::2] != (q.shape[0], 2 * q.shape[2]):
        raise ValueError(
            f"cross_attention: q is {list(q.shape)} and kv {list(kv.shape)}, "
            "expected [B, T, H·D] and [B, S, 2·H·D]"
        )
    if heads < 1 or q.shape[2] % heads:
        raise ValueError(f"cross_attention: q has rows of {q.shape[2]}, expected {heads} heads")

r"""Attention forward and backward by PyTorch's own kernels, with what they keep in plain sight.

$$o = \mathrm{softmax}(q k^T / \sqrt{D})\,v$$

`torch.nn.functional.scaled_dot_product_attention` decides which kernel runs; the same one is asked
here, without autograd, so that a block can keep o and compute q, k and v again.

Source: Dao et al., "FlashAttention", arXiv 2205.14135; kernels of PyTorch and cuDNN.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

__all__ = ["Kept", "sdpa", "sdpa_backward"]

Kept = tuple[Any, ...]
"""Of `sdpa`, beside o: which kernel ran, and what its backward pass needs."""

ATEN = torch.ops.aten


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Kept]:
    """o `[B, H, T, D]` of q `[B, H, T, D]`, k and v `[B, H, S, D]`, and what `sdpa_backward` needs.

    All without a gradient of their own.
    """
    backend = _backend(q, k, v)
    if backend == SDPBackend.MATH:
        return F.scaled_dot_product_attention(q, k, v), (backend,)
    if backend == SDPBackend.CUDNN_ATTENTION:
        o, *kept = ATEN._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    elif backend == SDPBackend.EFFICIENT_ATTENTION:
        o, *kept = ATEN._scaled_dot_product_efficient_attention(q, k, v, None, True)
    elif q.device.type == "cpu":
        o, *kept = ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    else:
        o, *kept = ATEN._scaled_dot_product_flash_attention(q, k, v)
    return o, (backend, *kept)


def sdpa_backward(  # noqa: PLR0917
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, kept: Kept
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    backend, *rest = kept
    given = (d_o, q, k, v)
    if backend == SDPBackend.MATH:
        return _math_backward(d_o, q, k, v)
    if backend == SDPBackend.CUDNN_ATTENTION:
        lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = rest
        lengths = (cum_q, cum_k, max_q, max_k)
        return ATEN._scaled_dot_product_cudnn_attention_backward(
            *given, o, lse, seed, offset, None, *lengths, 0.0, False
        )
    if backend == SDPBackend.EFFICIENT_ATTENTION:
        lse, seed, offset = rest
        wanted = [True, True, True, False]
        return ATEN._scaled_dot_product_efficient_attention_backward(
            *given, None, o, lse, seed, offset, 0.0, wanted
        )[:3]
    if q.device.type == "cpu":
        return ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            *given, o, *rest, 0.0, False
        )
    lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = rest
    return ATEN._scaled_dot_product_flash_attention_backward(
        *given, o, lse, cum_q, cum_k, max_q, max_k, 0.0, False, seed, offset
    )


def _backend(q: Tensor, k: Tensor, v: Tensor) -> SDPBackend:
    """The one that PyTorch would train with."""
    if q.is_meta:  # counted, never run: as fused kernels hold it
        return SDPBackend.FLASH_ATTENTION
    with torch.enable_grad():
        wanting = q.detach().requires_grad_()
        chosen = SDPBackend(torch._fused_sdp_choice(wanting, k, v))
    if chosen == SDPBackend.FLASH_ATTENTION and q.is_cuda and q.shape[-1] % 8:
        return SDPBackend.MATH  # PyTorch pads such heads before it calls that kernel
    return chosen


def _math_backward(d_o: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        dq, dk, dv = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), d_o)
    return dq, dk, dv

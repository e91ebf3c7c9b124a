"""Attention with what it keeps in plain sight is PyTorch's own."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from eri.layers.sdpa import sdpa, sdpa_backward

BACKENDS = [
    SDPBackend.MATH,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
]


def heads(batch: int, rows: int, keys: int, size: int, device, dtype) -> list[Tensor]:
    """Queries, keys and values `[B, H, T, D]` as projections lie: views of rows side by side."""
    torch.manual_seed(0)
    found = []
    for count in (rows, keys, keys):
        wide = torch.randn(batch, count, 2, 3, size, device=device).to(dtype)
        found.append(wide[:, :, 1].transpose(1, 2))
    return found


def theirs(d_o: Tensor, *qkv: Tensor) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in qkv)
    o = F.scaled_dot_product_attention(q, k, v)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), d_o)]


def ours(d_o: Tensor, *qkv: Tensor) -> tuple[list[Tensor], SDPBackend]:
    o, kept = sdpa(*qkv)
    return [o, *sdpa_backward(d_o, *qkv, o, kept)], kept[0]


@pytest.mark.parametrize("way", ["chosen", "math"])
@pytest.mark.parametrize("shape", [(2, 6, 6, 8), (1, 1, 77, 40), (3, 64, 5, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_pytorchs(dtype: torch.dtype, shape: tuple[int, ...], way: str) -> None:
    qkv = heads(*shape, "cpu", dtype)
    d_o = torch.randn_like(qkv[0])
    with sdpa_kernel(SDPBackend.MATH) if way == "math" else nullcontext():
        found, backend = ours(d_o, *qkv)
        torch.testing.assert_close(found, theirs(d_o, *qkv))
    assert (backend == SDPBackend.MATH) == (way == "math")


def test_on_meta_it_is_counted_as_fused() -> None:
    qkv = heads(1, 8, 8, 16, "meta", torch.bfloat16)
    o, kept = sdpa(*qkv)
    assert o.shape == qkv[0].shape
    assert kept[0] == SDPBackend.FLASH_ATTENTION
    assert [d.shape for d in sdpa_backward(o, *qkv, o, kept)] == [x.shape for x in qkv]


@pytest.mark.gpu
def test_heads_that_pytorch_would_pad() -> None:
    qkv = heads(1, 64, 64, 20, "cuda", torch.bfloat16)
    d_o = torch.randn_like(qkv[0])
    found, _ = ours(d_o, *qkv)
    torch.testing.assert_close(found, theirs(d_o, *qkv), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 256, 256, 64), (1, 128, 77, 40), (1, 64, 64, 160)])
def test_each_backend_of_a_gpu_is_pytorchs(backend: SDPBackend, shape: tuple[int, ...]) -> None:
    qkv = heads(*shape, "cuda", torch.bfloat16)
    d_o = torch.randn_like(qkv[0])
    with sdpa_kernel(backend):
        try:
            expected = theirs(d_o, *qkv)
        except RuntimeError as error:  # this card or this PyTorch has none for it
            pytest.skip(f"{backend.name}: {str(error).splitlines()[0]}")
        found, chosen = ours(d_o, *qkv)
    assert chosen == backend
    torch.testing.assert_close(found, expected)

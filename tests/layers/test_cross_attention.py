from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from eri.layers.backend import set_backend
from eri.layers.build import SOURCES
from eri.layers.cross_attention import (
    MOST_KEYS,
    attend,
    cross_attention,
    cross_attention_backward,
    unsupported,
)
from tests.kernel_checks import WITHOUT_VALUES, error, microseconds, poison, ulp

TYPES = [torch.float16, torch.bfloat16]


def inputs(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, kv and the gradient of o for (batch, heads, queries, keys, size)."""
    batch, heads, queries, keys, size = shape
    q, d_o = torch.randn(2, batch, queries, heads * size, device=device)
    kv = torch.randn(batch, keys, 2 * heads * size, device=device)
    return (scale * q).to(dtype), (scale * kv).to(dtype), d_o.to(dtype)


def of_pytorch(q: Tensor, kv: Tensor, d_o: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """o, dq and dkv by PyTorch's attention and autograd."""
    q, kv = q.detach().requires_grad_(), kv.detach().requires_grad_()
    o = attention(q, kv, heads)
    dq, dkv = torch.autograd.grad(o, (q, kv), d_o)
    return o.detach(), dq, dkv


def attention(q: Tensor, kv: Tensor, heads: int) -> Tensor:
    queries = q.unflatten(-1, (heads, -1)).transpose(1, 2)
    keys, values = kv.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)


def ours(q: Tensor, kv: Tensor, d_o: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    dkv = torch.empty_like(kv)
    dq = cross_attention_backward(d_o, q, kv, dkv, heads)
    return cross_attention(q, kv, heads).view(q.shape), dq.view(q.shape), dkv


@pytest.mark.parametrize("shape", [(2, 3, 5, 7, 4), (1, 1, 1, 1, 40), (2, 2, 4, 9, 64)])
def test_it_is_pytorchs_attention(shape: tuple[int, int, int, int, int]) -> None:
    given = inputs(shape)
    for found, expected in zip(ours(*given, shape[1]), of_pytorch(*given, shape[1]), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(2, 3, 2, 5, 4), (1, 2, 3, 1, 2)])
def test_attend_has_the_right_gradients_of_both_orders(
    shape: tuple[int, int, int, int, int],
) -> None:
    q, kv, d_o = inputs(shape)
    expected = of_pytorch(q, kv, d_o, shape[1])
    q.requires_grad_(), kv.requires_grad_()
    o = attend(q, kv, shape[1])
    torch.testing.assert_close((o.detach(), *torch.autograd.grad(o, (q, kv), d_o)), expected)
    assert torch.autograd.gradcheck(lambda q, kv: attend(q, kv, shape[1]), (q, kv))
    assert torch.autograd.gradgradcheck(lambda q, kv: attend(q, kv, shape[1]), (q, kv))


def test_the_ops_are_registered_as_pytorch_wants_them(device: torch.device) -> None:
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16
        loaded()
    for shape in ((2, 3, 5, 7, 40), (1, 2, 33, 81, 64)):
        q, kv, d_o = inputs(shape, dtype, device)
        forward = torch.ops.eri.cross_attention.default
        backward = torch.ops.eri.cross_attention_backward.default
        given = d_o, q, kv, torch.empty_like(kv)
        torch.library.opcheck(forward, (q, kv, shape[1], 0))
        torch.library.opcheck(forward, (q, kv, shape[1], 8), test_utils=WITHOUT_VALUES)
        torch.library.opcheck(backward, (*given, shape[1], 0))
        torch.library.opcheck(backward, (*given, shape[1], 8), test_utils=WITHOUT_VALUES)


def test_a_tail_is_left_behind_each_row() -> None:
    q, kv, d_o = inputs((2, 3, 5, 7, 4))
    dkv = torch.empty_like(kv)
    with poison():
        wide = cross_attention_backward(d_o, q, kv, dkv, 3, tail=6), cross_attention(q, kv, 3, 6)
    narrow = cross_attention_backward(d_o, q, kv, dkv, 3), cross_attention(q, kv, 3)
    for one, other in zip(wide, narrow, strict=True):
        assert one.shape == (10, 18) and one[:, 12:].isnan().all()
        assert torch.equal(one[:, :12], other)


def test_keys_and_values_may_lie_among_others() -> None:
    q, kv, d_o = inputs((2, 3, 5, 7, 4))
    all_words = torch.full((2, 7, 40), torch.nan, dtype=q.dtype)
    all_gradients = all_words.clone()
    own, d_own = all_words[..., 8:32], all_gradients[..., 8:32]
    own.copy_(kv)
    dq = cross_attention_backward(d_o, q, own, d_own, 3)
    o, expected, d_words = ours(q, kv, d_o, 3)
    assert torch.equal(dq.view(q.shape), expected) and torch.equal(d_own, d_words)
    assert torch.equal(cross_attention(q, own, 3).view(q.shape), o)
    assert all_gradients[..., :8].isnan().all() and all_gradients[..., 32:].isnan().all()


def test_reasons_are_in_words() -> None:
    def reason(
        size: int = 64, keys: int = 77, tail: int = 0, dtype: torch.dtype = torch.bfloat16
    ) -> str | None:
        q, kv = torch.zeros(1, 2, 2 * size), torch.zeros(1, keys, 4 * size)
        return unsupported(q.to(dtype), kv.bfloat16(), 2, tail)

    assert all(reason(size, keys) is None for size in (40, 64, 80, 160) for keys in (1, 256))
    assert reason(dtype=torch.float32) == "q is float32, not float16 or bfloat16"
    assert reason(dtype=torch.float16) == "q is float16, and kv bfloat16"
    assert reason(size=48) == "heads have 48 numbers, not one of 40, 64, 80, 160"
    assert reason(keys=257) == "there are 257 keys, not 1 to 256"
    assert reason(tail=4) == "a tail of 4 elements is no multiple of 8"
    empty = torch.zeros(1, 0, 64).half()
    assert unsupported(empty, torch.zeros(1, 1, 128).half(), 1) == (
        "q has 0 elements, not 1 to 2147483647"
    )
    many = torch.zeros(1, dtype=torch.bfloat16, device="meta")
    assert unsupported(many.expand(2**17, 1, 64), many.expand(2**17, 256, 128), 1) == (
        "kv has 4294967296 elements, not 1 to 2147483647"
    )


def test_the_limit_is_that_of_the_header() -> None:
    header = (SOURCES / "cross_attention.h").read_text()
    assert f"kCrossAttentionKeys = {MOST_KEYS};" in header


@pytest.mark.parametrize(
    ("q", "kv", "heads"),
    [((1, 2, 8), (1, 3, 8), 2), ((1, 2, 8), (2, 3, 16), 2), ((2, 8), (3, 16), 2)],
)
def test_shapes_must_fit(q: tuple[int, ...], kv: tuple[int, ...], heads: int) -> None:
    with pytest.raises(ValueError, match=r"expected \[B, T, H·D\] and \[B, S, 2·H·D\]"):
        cross_attention(torch.zeros(q), torch.zeros(kv), heads)
    with pytest.raises(ValueError, match="q has rows of 8, expected 3 heads"):
        cross_attention(torch.zeros(1, 2, 8), torch.zeros(1, 3, 16), 3)


# ------------------------------------------------------------------------------------- the kernels

gpu = pytest.mark.gpu
# PyTorch says once a process that the thread of its first backward pass had no CUDA context yet.
first_context = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")
KEYS = [1, 8, 77, 80, 81, 154, 231, 256]
QUERIES = [(1, 1), (4, 64), (1, 77), (2, 1000), (4, 1024), (1, 4096)]  # batch, queries of a sample


def loaded() -> None:
    """Builds and loads the kernels and refuses anything else."""
    set_backend("cuda")
    q, kv, _ = inputs((1, 1, 1, 1, 64), torch.bfloat16, "cuda")
    cross_attention(q, kv, 1)


def assert_exact(given: tuple[Tensor, Tensor, Tensor], heads: int) -> None:
    """The kernels' errors are at most twice those of PyTorch's attention."""
    q, kv, d_o = (x.double() for x in given)
    truths = of_pytorch(q, kv, d_o, heads)
    theirs, found = of_pytorch(*given, heads), ours(*given, heads)
    for kernel, eager, truth in zip(_apart(found), _apart(theirs), _apart(truths), strict=True):
        assert kernel.dtype == given[0].dtype and kernel.shape == truth.shape
        assert error(kernel, truth) <= 2 * error(eager, truth) + ulp(truth, kernel.dtype)


def _apart(results: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """o, dq, dk and dv."""
    return results[0], results[1], *results[2].chunk(2, dim=-1)


@gpu
@first_context
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", [40, 64, 80, 160])
@pytest.mark.parametrize("keys", KEYS)
def test_the_kernels_are_no_less_exact_than_pytorchs(
    keys: int, size: int, dtype: torch.dtype
) -> None:
    set_backend("cuda")
    for batch, queries in QUERIES:
        given = inputs((batch, 3, queries, keys, size), dtype, "cuda")
        assert_exact(given, 3)


@gpu
@first_context
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 130, 77, 64), (1, 2, 100, 154, 40), (2, 1, 70, 77, 160)])
def test_large_scores_do_not_overflow(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    set_backend("cuda")
    q, kv, d_o = inputs(shape, dtype, "cuda")
    for offset in (0.0, 40.0):  # scores around 0, and all of them far below it
        given = 20 * q - offset, 20 * kv + offset, d_o
        assert all(x.isfinite().all() for x in ours(*given, shape[1]))
        assert_exact(given, shape[1])


@gpu
@pytest.mark.parametrize("keys", [77, 154])
@pytest.mark.parametrize("size", [40, 64, 160])
def test_tails_and_gaps_change_no_bit(keys: int, size: int) -> None:
    set_backend("cuda")
    q, kv, d_o = inputs((2, 2, 100, keys, size), torch.bfloat16, "cuda")
    o, dq, dkv = ours(q, kv, d_o, 2)
    shifted = [torch.empty(x.numel() + 1, device="cuda").to(x)[1:].view(x.shape) for x in (q, kv)]
    far_q, far_kv = (x.copy_(y) for x, y in zip(shifted, (q, kv), strict=True))
    wide_kv, odd_kv = kv.new_full((2, 2, keys, kv.shape[2] + 24), torch.nan)
    apart = wide_kv[..., 16:-8].copy_(kv)  # among others, each row where a vector may begin
    d_apart, d_odd = torch.full_like(wide_kv, torch.nan)[..., 16:-8], odd_kv[..., 3:-21]
    for tail in (8, 48):
        for words, d_words in (far_kv, torch.empty_like(kv)), (apart, d_apart), (apart, d_odd):
            with poison():
                wide = cross_attention_backward(d_o, far_q, words, d_words, 2, tail)
                other = cross_attention(far_q, words, 2, tail)
            for rows, expected in (wide, dq), (other, o):
                assert torch.equal(rows[:, :-tail], expected.flatten(0, 1))
                assert rows[:, -tail:].isnan().all()
            assert torch.equal(d_words, dkv)
    assert odd_kv[..., :3].isnan().all() and odd_kv[..., -21:].isnan().all()


@gpu
def test_what_is_not_finite_stays_in_its_row_and_head() -> None:
    set_backend("cuda")
    q, kv, _ = inputs((2, 2, 40, 77, 64), torch.bfloat16, "cuda")
    clean = cross_attention(q, kv, 2).view(q.shape)
    q[1, 3, 70] = torch.nan
    o = cross_attention(q, kv, 2).view(q.shape)
    assert o[1, 3, 64:].isnan().all()
    o[1, 3, 64:] = clean[1, 3, 64:]
    assert torch.equal(o, clean)


@gpu
@pytest.mark.parametrize(
    "shape", [(2, 3, 1025, 77, 64), (1, 2, 500, 231, 40), (1, 2, 300, 77, 160)]
)
def test_the_kernels_give_the_same_bits_twice_and_in_a_graph(
    shape: tuple[int, int, int, int, int],
) -> None:
    set_backend("cuda")
    given = inputs(shape, torch.bfloat16, "cuda")
    first = ours(*given, shape[1])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ours(*given, shape[1])
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours(*given, shape[1])
    graph.replay()
    for once, again, in_graph in zip(first, ours(*given, shape[1]), captured, strict=True):
        assert torch.equal(once, again) and torch.equal(once, in_graph)


@gpu
@first_context
def test_what_the_kernels_cannot_do_the_reference_does() -> None:
    said: list[str] = []
    set_backend("auto", said.append)
    given = inputs((2, 2, 5, 7, 64), torch.float32, "cuda")
    for found, expected in zip(ours(*given, 2), of_pytorch(*given, 2), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert any("cross_attention: PyTorch's own operations" in line for line in said)


@gpu
@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ("cross_attention: q is of type", lambda d_o, q, kv: (d_o, q.float(), kv, 2, 0)),
        ("cross_attention: kv is of type", lambda d_o, q, kv: (d_o, q, kv.half(), 2, 0)),
        ("cross_attention: q has", lambda d_o, q, kv: (d_o, q.mT.contiguous().mT, kv, 2, 0)),
        ("cross_attention: 3 heads", lambda d_o, q, kv: (d_o, q, kv, 3, 0)),
        ("cross_attention: kv is", lambda d_o, q, kv: (d_o, q, kv[..., :64].contiguous(), 2, 0)),
        ("cross_attention: d_o has", lambda d_o, q, kv: (d_o[:, :1].contiguous(), q, kv, 2, 0)),
        ("cross_attention: tail is 4", lambda d_o, q, kv: (d_o, q, kv, 2, 4)),
    ],
)
def test_the_kernel_names_what_it_cannot_take(
    message: str, wrong: Callable[[Tensor, Tensor, Tensor], tuple[Tensor | int, ...]]
) -> None:
    loaded()
    q, kv, d_o = inputs((1, 2, 4, 5, 64), torch.bfloat16, "cuda")
    d_o, q, words, heads, tail = wrong(d_o, q, kv)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.eri.cross_attention_backward(d_o, q, words, torch.empty_like(kv), heads, tail)


@gpu
@first_context
def test_bandwidth() -> None:
    set_backend("cuda")
    for shape in (
        *((4, 10, 4096, 77, 64), (4, 20, 1024, 77, 64), (1, 10, 4096, 77, 64)),
        *((1, 20, 1024, 77, 64), (4, 8, 4096, 77, 40), (4, 8, 1024, 77, 80)),
        *((4, 8, 256, 77, 160), (4, 10, 4096, 154, 64), (4, 10, 4096, 231, 64)),
    ):
        heads = shape[1]
        sets = [inputs(shape, torch.bfloat16, "cuda") for _ in range(4)]
        sets = [(q, kv, d_o, torch.empty_like(kv)) for q, kv, d_o in sets]
        size = sets[0][0].nbytes
        us = microseconds(lambda i, s=sets, h=heads: cross_attention(*s[i][:2], h))
        back = microseconds(
            lambda i, s=sets, h=heads: cross_attention_backward(s[i][2], *s[i][:2], s[i][3], h)
        )
        line = f"{shape}: {us:6.1f} us, {2 * size / us / 1e3:5.0f} GB/s; backward {back:6.1f} us, "
        line += f"{3 * size / back / 1e3:5.0f} GB/s"
        quickest = torch.inf
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            theirs, their_back = sdpa_times(sets, heads, backend)
            quickest = min(quickest, their_back)
            line += f"; {backend.name[:5].lower()} {theirs:6.1f}, {their_back:6.1f} us"
        print(f"\n{line}", end="")
        if shape[3] == 77:
            assert back < quickest


def sdpa_times(
    sets: list[tuple[Tensor, ...]], heads: int, backend: SDPBackend
) -> tuple[float, float]:
    """Microseconds of PyTorch's attention, forward and, with a forward pass taken off, backward."""
    with sdpa_kernel(backend):
        us = microseconds(lambda i: attention(*sets[i][:2], heads))
        leaves = [(q.detach().requires_grad_(), kv.detach().requires_grad_()) for q, kv, *_ in sets]
        # both in one graph: autograd goes backward on the stream that it went forward on
        both = microseconds(
            lambda i: torch.autograd.grad(attention(*leaves[i], heads), leaves[i], sets[i][2])
        )
    return us, both - us

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eri.run.live_bytes import LiveBytes, backward, fused_attention

KIB = 1024


def block(count: int = 256) -> Tensor:
    """1 KiB on `meta`, unless said."""
    return torch.empty(count, device="meta")


def followed(run: Callable[[], object], there: list[Tensor]) -> tuple[int, int]:
    """KiB at the most and at the end, where the result is let go."""
    held = LiveBytes(there)
    with held:
        run()
    return held.peak // KIB, held.now // KIB


def test_what_lives_at_once_is_counted() -> None:
    x = block()

    def chain() -> None:
        y = x + 1
        z = y * 2  # x is not counted; y and z are
        del y
        z.exp()

    assert followed(chain, [x]) == (2, 0)


def test_what_is_kept_outlives_the_mode() -> None:
    x, kept = block(), []
    held = LiveBytes([x])
    with held:
        kept.append(x + 1)
        kept.append(kept[0] + 1)
    assert held.now == 2 * KIB
    del kept[:]
    assert (held.now, held.peak) == (0, 2 * KIB)


def test_views_and_writing_in_place_take_nothing() -> None:
    x = block()

    def work() -> None:
        y = x + 1
        for _ in range(3):
            y.add_(x).mul_(2)
            torch.mul(y, 2, out=y)
        y.view(16, 16).T[3].unsqueeze(0).add_(1)
        assert torch.add(y, x, out=y) is y

    assert followed(work, [x]) == (1, 0)


def test_a_call_that_is_known_makes_the_same_tensors() -> None:
    x = torch.empty(3, dtype=torch.int32, device="meta")
    rows = torch.empty(8, 6, device="meta")
    with LiveBytes([x, rows]):
        assert [(x * by).dtype for by in (1, 1.0, 1)] == [torch.int32, torch.float32, torch.int32]
        one, other = (torch.native_layer_norm(rows, [6], None, None, 1e-5) for _ in range(2))
        assert [t.shape for t in one] == [t.shape for t in other] and len(one) == 3
        assert [torch.mm(rows, m).stride() for m in (rows.T, rows.T)] == [(8, 1), (8, 1)]


@pytest.mark.parametrize("by_pixels", ["maps", "weights", "nothing"])
def test_convolutions_give_maps_as_a_gpu_lays_them_out(by_pixels: str) -> None:
    x = torch.empty(4, 8, 6, 6, device="meta", requires_grad=True)
    conv = nn.Conv2d(8, 16, 3, padding=1, device="meta")
    if by_pixels == "maps":
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    elif by_pixels == "weights":
        conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    forward, back = (
        ((36, 6, 1), (36, 6, 1)) if by_pixels == "nothing" else ((1, 96, 16), (1, 48, 8))
    )
    with LiveBytes([x, *conv.parameters()]):
        for _ in range(2):
            y = conv(x)
            assert y.stride()[1:] == forward
            (dx,) = torch.autograd.grad(y, x, torch.empty_like(y))
            assert dx.stride()[1:] == back


def trained() -> Tensor:
    """1 KiB that has a gradient already."""
    x = block().requires_grad_()
    x.grad = block()
    return x


def peak_of_a_step(run: Callable[[Tensor], Tensor]) -> int:
    """KiB at the most, with nothing left at the end."""
    x = trained()
    assert x.grad is not None
    peak, left = followed(lambda: backward(run(x).sum()), [x, x.grad])
    assert left == 0
    return peak


def test_what_autograd_keeps_is_counted() -> None:
    def sines(x: Tensor) -> Tensor:
        for _ in range(8):
            x = x.sin()  # keeps its input
        return x

    # beside the first input 7 are kept, and there are a result, a gradient, and what makes it
    assert 8 <= peak_of_a_step(sines) <= 11


def test_what_is_computed_again_is_counted_once_at_a_time() -> None:
    def wide(x: Tensor) -> Tensor:
        return torch.cat([x] * 16).sin().view(16, -1).sum(0)  # keeps 16 KiB

    def kept(x: Tensor) -> Tensor:
        for _ in range(8):
            x = wide(x)
        return x

    def again(x: Tensor) -> Tensor:
        for _ in range(8):
            y = checkpoint(wide, x, use_reentrant=False)
            assert isinstance(y, Tensor)
            x = y
        return x

    assert 8 * 16 < peak_of_a_step(kept) < 12 * 16
    assert 2 * 16 < peak_of_a_step(again) < 5 * 16


@pytest.mark.parametrize("recompute", [False, True])
def test_attention_has_no_scores_in_either_pass(recompute: bool) -> None:
    def attend(x: Tensor) -> Tensor:
        q = x.view(1, 2, 4096, 32)
        return F.scaled_dot_product_attention(q, q, q)

    x = torch.empty(2 * 4096 * 32, device="meta", requires_grad=True)  # 1 MiB; the scores are 128
    x.grad = torch.empty_like(x)
    held = LiveBytes([x, x.grad])
    with held, fused_attention():
        y = checkpoint(attend, x, use_reentrant=False) if recompute else attend(x)
        assert isinstance(y, Tensor)
        backward(y.sum())
    assert held.peak < 8 * x.nbytes


def test_it_counts_what_the_allocator_of_a_cpu_gives() -> None:
    net = nn.Sequential(
        *(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4))
    )
    x = torch.randn(512, 64)
    net(x).square().sum().backward()  # the gradients are there from now on
    with torch.profiler.profile(profile_memory=True) as profile:
        net(x).square().sum().backward()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()  # type: ignore[attr-defined]
            peak = max(peak, now)
    copy = net.to("meta")
    for parameter in copy.parameters():
        parameter.grad = torch.empty_like(parameter)
    x = x.to("meta")
    held = LiveBytes([x, *(t for p in copy.parameters() for t in (p, p.grad) if t is not None)])
    with held:
        backward(copy(x).square().sum())
    assert held.peak == pytest.approx(peak, rel=0.02)

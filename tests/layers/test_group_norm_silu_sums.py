"""What `group_norm_silu` adds: numbers to its input before, and a map to its gradient."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from eri.errors import ConfigError
from eri.layers.backend import set_backend
from eri.layers.group_norm_silu import (
    group_norm_silu_backward,
    group_norm_silu_forward,
    unsupported,
)
from tests.kernel_checks import copy_bandwidth, error, microseconds, ulp, with_gaps
from tests.layers.test_group_norm_silu import (
    FORMATS,
    ODD,
    REAL,
    TYPES,
    a_map,
    eager,
    frozen,
    loaded,
    on_card,
)

Sums = tuple[Tensor | None, Tensor | None]  # what is added before, and to the gradient


def both(
    x: Tensor, dy: Tensor, norm: nn.GroupNorm, sums: Sums, silu: bool = True
) -> tuple[Tensor, Tensor]:
    """The result and the gradient of x."""
    added, plus = sums
    y, mean_rstd = group_norm_silu_forward(x, norm, added, silu=silu)
    return y, group_norm_silu_backward(dy, x, mean_rstd, norm, added, plus, silu=silu)


def by_eager(
    x: Tensor, dy: Tensor, norm: nn.GroupNorm, sums: Sums, silu: bool = True
) -> tuple[Tensor, Tensor]:
    added, plus = sums
    x = x.detach().requires_grad_()
    y = eager(x if added is None else x + added[:, :, None, None], norm, silu)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y.detach(), dx if plus is None else dx + plus


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("which", ["both", "added", "plus", "neither"])
def test_they_are_those_of_pytorch(which: str, layout: torch.memory_format, silu: bool) -> None:
    norm = frozen(3, 12)
    x, dy, plus = a_map(2, 12, 5, 3, layout=layout), a_map(2, 12, 5, 3), a_map(2, 12, 5, 3)
    added = 3 * torch.randn(2, 12, dtype=torch.float64)
    given = [t.clone() for t in (x, dy, plus, added)]
    sums = (
        added if which in {"both", "added"} else None,
        plus if which in {"both", "plus"} else None,
    )
    found = both(x, dy, norm, sums, silu)
    torch.testing.assert_close(found, by_eager(x, dy, norm, sums, silu))
    assert all(t.is_contiguous(memory_format=layout) for t in found)
    assert all(map(torch.equal, given, (x, dy, plus, added)))  # nothing of it was written to


def test_numbers_of_another_type_leave_the_type_of_the_map() -> None:
    norm = frozen(32, 64, torch.bfloat16)
    x, dy = (a_map(2, 64, 5, 3).bfloat16() for _ in range(2))
    added = torch.randn(2, 64)
    found = both(x, dy, norm, (added, None))
    truth = by_eager(x.double(), dy.double(), norm.double(), (added.double(), None))
    for ours, true in zip(found, truth, strict=True):
        assert ours.dtype == torch.bfloat16
        assert error(ours, true) <= 2 * ulp(true, torch.bfloat16)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_the_ops_are_registered_as_pytorch_wants_them(
    layout: torch.memory_format, device: torch.device
) -> None:
    if device.type == "cuda":
        loaded()
        layout = torch.channels_last
    x, plus = torch.randn(2, 2, 64, 5, 3, device=device)
    x = x.contiguous(memory_format=layout)
    plus = plus.contiguous(memory_format=layout)
    norm, added = frozen(32, 64, torch.float32).to(device), torch.randn(2, 64, device=device)
    weights = (norm.weight, norm.bias, 32)
    arguments = (x.clone().requires_grad_(), *weights, 1e-5, True, added)
    torch.library.opcheck(torch.ops.eri.group_norm_silu.default, arguments)
    _, mean_rstd = torch.ops.eri.group_norm_silu(x, *weights, 1e-5, True, added)
    for sums in ((added, plus), (None, plus), (added, None)):
        backward = (torch.randn_like(x), x, mean_rstd, *weights, True, *sums)
        torch.library.opcheck(torch.ops.eri.group_norm_silu_backward.default, backward)


def test_the_op_has_the_right_gradient_of_a_sum() -> None:
    x, norm, added = a_map(2, 6, 3, 2).requires_grad_(), frozen(2, 6), torch.randn(2, 6).double()

    def op(x: Tensor, added: Tensor = added) -> Tensor:
        weights = (norm.weight, norm.bias, 2)
        return torch.ops.eri.group_norm_silu(x, *weights, 1e-5, True, added)[0]

    assert torch.autograd.gradcheck(op, (x,))
    with pytest.raises(ValueError, match="what is added is frozen"):
        op(x, added.clone().requires_grad_())


def test_reasons_are_in_words() -> None:
    x, row = torch.zeros(1, 64, 5, 5).contiguous(memory_format=torch.channels_last), torch.ones(64)
    assert unsupported(x, row, row, 32, row[None]) is None
    found = unsupported(x, row, row, 32, row[None].half())
    assert found == "what is added is float16, x is float32"


def test_the_backend_cuda_refuses_other_devices() -> None:
    set_backend("cuda")
    norm, x = frozen(32, 64, torch.float32), a_map(1, 64, 5, 5).float()
    with pytest.raises(ConfigError, match="this is cpu"):
        group_norm_silu_forward(x, norm)
    with pytest.raises(ConfigError, match="this is cpu"):
        group_norm_silu_backward(x, x, torch.zeros(1, 32, 2), norm)


# ------------------------------------------------------------------------------------- the kernels

gpu = pytest.mark.gpu


def check(x: Tensor, groups: int, sums: Sums, *, silu: bool = True) -> None:
    """Results and gradients are no less exact than eager's; see the house's rule."""
    set_backend("cuda")
    norm, dy = frozen(groups, x.shape[1], x.dtype).cuda(), torch.randn_like(x)
    found, of_eager = both(x, dy, norm, sums, silu), by_eager(x, dy, norm, sums, silu)
    added, plus = (None if t is None else t.double() for t in sums)
    truth = by_eager(x.double(), dy.double(), norm.double(), (added, plus), silu)
    for ours, theirs, true in zip(found, of_eager, truth, strict=True):
        assert ours.dtype == x.dtype and ours.shape == x.shape
        assert ours.is_contiguous(memory_format=torch.channels_last)
        allowed = 2 * error(theirs, true) + ulp(true, x.dtype)
        assert error(ours, true) <= allowed, f"{error(ours, true):.3g}, allowed {allowed:.3g}"


def sums_for(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.randn(x.shape[:2], device="cuda").to(x.dtype), torch.randn_like(x)


@gpu
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [*REAL[1:6], *ODD], ids=str)
def test_the_kernels_are_no_less_exact_than_eager(
    shape: tuple[int, ...], dtype: torch.dtype, silu: bool
) -> None:
    x = on_card(*shape, dtype=dtype)
    check(x, 32, sums_for(x), silu=silu)


@gpu
@pytest.mark.parametrize("groups", [1, 5, 32, 160, 320])
def test_any_groups(groups: int) -> None:
    x = on_card(2, 320, 9, 11, dtype=torch.bfloat16)
    check(x, groups, sums_for(x))


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_numbers_of_channels_cost_16_bits_nothing(dtype: torch.dtype) -> None:
    set_backend("cuda")
    x, norm = on_card(2, 320, 32, 32, dtype=dtype), frozen(32, 320, dtype).cuda()
    added = torch.full((2, 320), 100.0, device="cuda", dtype=dtype)
    added[1] = -1000.0
    found = both(x, torch.ones_like(x), norm, (added, None))
    truth = by_eager(x.double(), torch.ones_like(x).double(), norm.double(), (added.double(), None))
    for ours, true in zip(found, truth, strict=True):
        assert error(ours, true) <= 2 * ulp(true, dtype)


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 320, 64, 64), (3, 64, 2, 3), (3, 5120, 5, 7)], ids=str)
def test_zeros_change_no_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    set_backend("cuda")
    norm = frozen(32, shape[1], dtype).cuda()
    x, dy = (on_card(*shape, dtype=dtype) for _ in range(2))
    zeros = x.new_zeros(shape[:2]), torch.zeros_like(x)
    plain = both(x, dy, norm, (None, None))
    assert all(map(torch.equal, both(x, dy, norm, zeros), plain))


@gpu
def test_what_is_added_to_the_gradient_is_added_once_in_float32() -> None:
    set_backend("cuda")
    norm = frozen(32, 320, torch.float32).cuda()
    x, dy, plus = (on_card(2, 320, 33, 31, dtype=torch.float32) for _ in range(3))
    _, dx = both(x, dy, norm, (None, None))
    assert torch.equal(both(x, dy, norm, (None, plus))[1], dx + plus)


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_what_lies_otherwise(dtype: torch.dtype) -> None:
    set_backend("cuda")
    norm = frozen(32, 320, dtype).cuda()
    x, dy, plus = (on_card(3, 320, 9, 11, dtype=dtype) for _ in range(3))
    added, _ = sums_for(x)
    expected = both(x, dy, norm, (added, plus))
    wide = on_card(3, 480, 9, 13, dtype=dtype)[:, 72:392, :, 1:12].copy_(plus)
    shifted = torch.empty(added.numel() + 1, device="cuda", dtype=dtype)[1:].view_as(added)
    shifted.copy_(added)
    for row in (shifted, with_gaps(added, 8), with_gaps(added, 3), added.t().contiguous().t()):
        for other in (wide, plus.contiguous()):
            assert all(map(torch.equal, both(x, dy, norm, (row, other)), expected))
    alike = added[:1].expand(3, -1)
    expected = both(x, dy, norm, (alike.contiguous(), plus))
    assert all(map(torch.equal, both(x, dy, norm, (alike, plus)), expected))


@gpu
def test_the_kernels_give_the_same_bits_twice_and_in_a_graph() -> None:
    set_backend("cuda")
    norm = frozen(32, 320, torch.bfloat16).cuda()
    x, dy = (on_card(4, 320, 128, 128, dtype=torch.bfloat16) for _ in range(2))
    sums = sums_for(x)
    first, again = (both(x, dy, norm, sums) for _ in range(2))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both(x, dy, norm, sums)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(x, dy, norm, sums)
    graph.replay()
    for once, twice, in_graph in zip(first, again, captured, strict=True):
        assert torch.equal(once, twice) and torch.equal(once, in_graph)


@gpu
@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("added", lambda x: x.new_zeros(2, 32), "added has 64 elements, expected 2 rows of 64"),
        ("added", lambda x: x.new_zeros(2, 64).half(), "added is of type Half"),
        ("added", lambda x: torch.zeros(2, 64, dtype=x.dtype), "added is not on cuda:0"),
        ("added", lambda x: x.new_zeros(64, 2).t(), "added has no rows at one stride"),
        ("plus", lambda x: x.contiguous(), "plus is not .* in channels_last"),
        ("plus", lambda x: x[:1], "plus has 1 elements in dimension 0, expected 2"),
        ("plus", lambda x: x.half(), "plus is of type Half"),
        ("dy", lambda x: x[:, :, :2], "dy "),
    ],
)
def test_the_kernel_names_what_it_cannot_take(
    name: str, wrong: Callable[[Tensor], Tensor], message: str
) -> None:
    loaded()
    x = on_card(2, 64, 5, 3, dtype=torch.bfloat16)
    given = {"dy": x, "x": x, "mean_rstd": torch.zeros(2, 32, 2, device="cuda")}
    given |= {"weight": x.new_ones(64), "bias": x.new_ones(64)}
    sums = {"added": x.new_zeros(2, 64), "plus": x}
    (given if name in given else sums)[name] = wrong(x)
    with pytest.raises(RuntimeError, match=f"group_norm_silu: {message}"):
        torch.ops.eri.group_norm_silu_backward(*given.values(), 32, True, *sums.values())


@gpu
def test_bandwidth() -> None:
    loaded()
    copied = copy_bandwidth()
    print(f"\na copy moves {copied / 1e12:.2f} TB/s; bytes: 4 an element forward, 8 backward")
    for shape in REAL:
        norm = frozen(32, shape[1], torch.bfloat16).cuda()
        sets = [[on_card(*shape, dtype=torch.bfloat16) for _ in range(3)] for _ in range(4)]
        added = [sums_for(x)[0] for x, _, _ in sets]
        kept = [group_norm_silu_forward(sets[i][0], norm, added[i])[1] for i in range(4)]

        def forward(i: int, norm=norm, sets=sets, added=added) -> object:
            return group_norm_silu_forward(sets[i][0], norm, added[i])

        def backward(i: int, norm=norm, sets=sets, added=added, kept=kept) -> object:
            x, dy, plus = sets[i]
            return group_norm_silu_backward(dy, x, kept[i], norm, added[i], plus)

        for name, size, again, work in (("forward", 4, 2, forward), ("backward", 8, 4, backward)):
            time = microseconds(work)
            elements = torch.Size(shape).numel()
            reached = size * elements / time * 1e6
            print(f"{shape!s:20} {name:8}: {time:6.1f} us, {reached / 1e12:.2f} TB/s")
            if elements > 2**24:  # x and dy are read twice, and miss the cache
                assert reached * (size + again) / size > 0.6 * copied

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eri.errors import ConfigError
from eri.layers.backend import set_backend
from eri.layers.build import SOURCES
from eri.layers.group_norm_silu import (
    MOST_ELEMENTS,
    MOST_SAMPLES,
    MOST_VECTORS,
    group_norm_beside,
    group_norm_silu,
    unsupported,
)
from tests.kernel_checks import copy_bandwidth, error, microseconds, ulp

TYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMATS = [torch.channels_last, torch.contiguous_format]


def frozen(groups: int, channels: int, dtype: torch.dtype = torch.float64) -> nn.GroupNorm:
    """A norm whose weights are not trained, like those of a base model."""
    norm = nn.GroupNorm(groups, channels).to(dtype).requires_grad_(False)
    norm.weight.normal_().add_(1.0)
    norm.bias.normal_()
    return norm


def eager(x: Tensor, norm: nn.GroupNorm, silu: bool) -> Tensor:
    y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(y) if silu else y


def a_map(*shape: int, layout: torch.memory_format = torch.channels_last) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_it_is_pytorchs_group_norm_and_silu(layout: torch.memory_format, silu: bool) -> None:
    x, dy = a_map(2, 12, 5, 3, layout=layout).requires_grad_(), a_map(2, 12, 5, 3)
    norm = frozen(3, 12)
    y, expected = group_norm_silu(x, norm, silu=silu), eager(x, norm, silu)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=layout)
    for gradient in (dy, dy.contiguous(), dy[:, :1].expand(2, 12, 5, 3)):
        (found,) = torch.autograd.grad(y, x, gradient, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected, x, gradient, retain_graph=True)
        torch.testing.assert_close(found, wanted)
        assert found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_what_goes_around_a_norm_adds_its_gradient(
    device: torch.device, layout: torch.memory_format
) -> None:
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    norm = frozen(4, 16, dtype).to(device)
    x = a_map(2, 16, 5, 3, layout=layout).to(device, dtype).requires_grad_()
    dy, around = (a_map(2, 16, 5, 3, layout=layout).to(device, dtype) for _ in range(2))
    n, same = group_norm_beside(x, norm)
    assert torch.equal(same, x)
    torch.testing.assert_close(n, eager(x, norm, False))
    (found,) = torch.autograd.grad((n, same), x, (dy, around))
    (expected,) = torch.autograd.grad(eager(x, norm, False), x, dy)
    torch.testing.assert_close(found, expected + around)


def test_in_16_bits_statistics_do_not_differ_from_pytorchs() -> None:
    x = a_map(2, 64, 9, 7).bfloat16().requires_grad_()
    norm = frozen(32, 64, torch.bfloat16)
    y, expected = group_norm_silu(x, norm), eager(x, norm, True)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, dy)
    (wanted,) = torch.autograd.grad(expected, x, dy)
    torch.testing.assert_close(found, wanted, atol=0.03, rtol=0.03)


def test_a_norm_without_weights() -> None:
    x = a_map(2, 12, 5, 3).requires_grad_()
    norm = nn.GroupNorm(3, 12, affine=False).double()
    y, expected = group_norm_silu(x, norm), eager(x, norm, True)
    torch.testing.assert_close(y, expected)
    (found,), (wanted,) = (torch.autograd.grad(t.sum(), x) for t in (y, expected))
    torch.testing.assert_close(found, wanted)


def test_it_keeps_its_input_alone() -> None:
    kept: list[Tensor] = []
    x = a_map(2, 64, 16, 16).requires_grad_()
    norm = frozen(32, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        for op in (
            lambda: group_norm_silu(x, norm),
            lambda: torch.ops.eri.group_norm_silu(x, norm.weight, norm.bias, 32, 1e-5, True)[0],
        ):
            kept.clear()
            op()
            assert sum(t.numel() for t in kept if t.data_ptr() != x.data_ptr()) < 1000
            assert sum(t.data_ptr() == x.data_ptr() for t in kept) == 1


def test_a_result_that_nobody_uses_has_no_gradient() -> None:
    x = a_map(2, 12, 5, 3).requires_grad_()
    norm = frozen(3, 12)
    _, mean_rstd = torch.ops.eri.group_norm_silu(x, norm.weight, norm.bias, 3, 1e-5, True)
    assert not mean_rstd.requires_grad
    torch.testing.assert_close(mean_rstd[..., 0], x.detach().unflatten(1, (3, 4)).mean((2, 3, 4)))


@pytest.mark.parametrize("silu", [True, False])
def test_the_op_has_the_right_gradient(silu: bool) -> None:
    x = a_map(2, 6, 3, 2).requires_grad_()
    norm = frozen(2, 6)

    def op(x: Tensor) -> Tensor:
        return torch.ops.eri.group_norm_silu(x, norm.weight, norm.bias, 2, 1e-5, silu)[0]

    assert torch.autograd.gradcheck(op, (x,))


@pytest.mark.parametrize("shape", [(2, 64, 5, 3), (1, 64, 1, 1), (3, 96, 1, 7)])
@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_ops_are_registered_as_pytorch_wants_them(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, device: torch.device
) -> None:
    if device.type == "cuda":
        if layout == torch.contiguous_format and shape[2:] != (1, 1):
            pytest.skip("the kernels take no map that lies channel by channel")
        loaded()
    x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)
    norm = frozen(32, shape[1], dtype).to(device)
    weights = (norm.weight, norm.bias, 32)
    arguments = (x.clone().requires_grad_(), *weights, 1e-5, True)
    torch.library.opcheck(torch.ops.eri.group_norm_silu.default, arguments)
    _, mean_rstd = torch.ops.eri.group_norm_silu(x, *weights, 1e-5, True)
    backward = (torch.randn_like(x), x, mean_rstd, *weights, True)
    torch.library.opcheck(torch.ops.eri.group_norm_silu_backward.default, backward)


def reason(
    *shape: int, groups: int = 32, dtype: torch.dtype = torch.bfloat16, **changes: torch.dtype
) -> str | None:
    x = torch.empty(shape, dtype=dtype, device="meta")
    x = x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x
    rows = [
        torch.empty(shape[1], dtype=changes.get(name, dtype), device="meta")
        for name in ("weight", "bias")
    ]
    return unsupported(x, *rows, groups)


def test_reasons_are_in_words() -> None:
    for width in (320, 640, 960, 1280, 1920, 2560):
        for dtype in TYPES:
            assert reason(4, width, 64, 64, dtype=dtype) is None
    assert reason(2, 64, 5) == "x is [2, 64, 5], not a map [B, C, H, W] with elements"
    assert reason(0, 64, 5, 5) == "x is [0, 64, 5, 5], not a map [B, C, H, W] with elements"
    found = reason(1, 64, 5, 5, dtype=torch.float64)
    assert found == "x is float64, not float32, float16 or bfloat16"
    found = reason(1, 64, 5, 5, bias=torch.float32)
    assert found == "bias is float32, x is bfloat16"
    found = unsupported(torch.zeros(1, 64, 5, 5), None, None, 32)
    assert found == "there is no weight"
    found = unsupported(torch.zeros(1, 64, 5, 5), torch.ones(64), torch.ones(64), 32)
    assert found == "x does not lie pixel by pixel (channels_last)"
    found = reason(1, 36, 5, 5, groups=12)
    assert found == "x has 36 channels, not a multiple of 8 and of 12 groups"
    assert reason(1, 36, 5, 5, groups=12, dtype=torch.float32) is None
    assert reason(1, 5120, 5, 5, groups=2) is None
    assert reason(1, 5120, 5, 5, groups=1) == "groups of 5120 channels are too wide"
    assert reason(1, 2664, 5, 5, groups=8) == "groups of 333 channels are too wide"
    assert reason(65536, 64, 1, 1) == "x is [65536, 64, 1, 1], too large"
    assert reason(1, 64, 8192, 4096) == "x is [1, 64, 8192, 4096], too large"
    assert reason(65535, 32776, 1, 1, groups=32776) == "x is [65535, 32776, 1, 1], too large"


def test_the_limits_are_those_of_the_header() -> None:
    header = (SOURCES / "group_norm_silu.h").read_text()
    found = re.findall(r"constexpr \w+ kGroupNorm(\w+) = (.+?);", header)
    assert dict(found) == {
        "Vectors": str(MOST_VECTORS),
        "Samples": str(MOST_SAMPLES),
        "Sample": f"1LL << {MOST_ELEMENTS.bit_length() - 1}",
    }


def test_the_backend_cuda_refuses_other_devices() -> None:
    set_backend("cuda")
    with pytest.raises(ConfigError, match="this is cpu"):
        group_norm_silu(a_map(1, 64, 5, 5).float(), frozen(32, 64, torch.float32))


# ------------------------------------------------------------------------------------- the kernels

gpu = pytest.mark.gpu
WIDTHS = [320, 640, 960, 1280, 1920, 2560]
REAL = [(1, 320, 128, 128), (4, 320, 128, 128), (2, 960, 128, 128), (4, 1920, 64, 64)]
REAL += [(2, 640, 104, 152), (4, 1280, 32, 32), (1, 2560, 32, 32), (8, 1280, 8, 8)]
# one pixel, fewer pixels than a block's rows, primes, more tiles than one, a slab that is not all
ODD = [(1, 320, 1, 1), (3, 64, 2, 3), (2, 320, 7, 1), (5, 96, 13, 17), (1, 640, 61, 67)]
ODD += [(3, 5120, 5, 7), (2, 2560, 3, 3), (1, 64, 512, 513)]


def loaded() -> None:
    """Builds and loads the kernels and refuses anything else."""
    set_backend("cuda")
    x = torch.zeros(1, 32, 1, 1, device="cuda")
    group_norm_silu(x, nn.GroupNorm(4, 32, device="cuda").requires_grad_(False))


def on_card(*shape: int, mean: float = 0.0, dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape, device="cuda") + mean
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def results(x: Tensor, dy: Tensor, norm: nn.GroupNorm, silu: bool, op=group_norm_silu):
    x = x.detach().requires_grad_()
    y = op(x, norm, silu=silu)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def check(x: Tensor, groups: int, *, silu: bool = True, dy: Tensor | None = None) -> None:
    """Outputs and gradients are no less exact than eager's; see the house's rule."""
    set_backend("cuda")
    norm = frozen(groups, x.shape[1], x.dtype).cuda()
    dy = torch.randn_like(x) if dy is None else dy
    found = results(x, dy, norm, silu)
    of_eager = results(x, dy, norm, silu, op=eager)
    truth = results(x.double(), dy.double(), norm.double(), silu, op=eager)
    for ours, theirs, true in zip(found, of_eager, truth, strict=True):
        assert ours.dtype == x.dtype and ours.shape == x.shape
        assert ours.is_contiguous(memory_format=torch.channels_last)
        allowed = 2 * error(theirs, true) + ulp(true, x.dtype)
        assert error(ours, true) <= allowed, f"{error(ours, true):.3g}, allowed {allowed:.3g}"


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [*REAL, *ODD], ids=str)
def test_the_kernels_are_no_less_exact_than_eager(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    check(on_card(*shape, dtype=dtype), 32)


@gpu
@pytest.mark.parametrize("groups", [1, 2, 4, 5, 8, 16, 64, 160, 320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_groups(groups: int, dtype: torch.dtype) -> None:
    check(on_card(2, 320, 9, 11, dtype=dtype), groups)


@gpu
@pytest.mark.parametrize("width", [8, 16, 24, 40, 56, 88, 104, 328, 2568])
def test_any_width(width: int) -> None:
    for groups in (1, 2, 4, 8, width):
        x = on_card(2, width, 9, 11, dtype=torch.float32)
        if width % groups == 0 and unsupported(x, x[0, :, 0, 0], x[0, :, 0, 0], groups) is None:
            check(x, groups)


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_without_silu(width: int, dtype: torch.dtype) -> None:
    check(on_card(2, width, 16, 24, dtype=dtype), 32, silu=False)


@gpu
@pytest.mark.parametrize("mean", [100.0, -3000.0])
@pytest.mark.parametrize("shape", [(2, 320, 64, 64), (1, 1280, 5, 7)], ids=str)
def test_a_large_mean_costs_no_digits(shape: tuple[int, ...], mean: float) -> None:
    check(on_card(*shape, mean=mean, dtype=torch.float32), 32)
    channels = torch.randn(1, shape[1], 1, 1, device="cuda") * abs(mean)
    check(on_card(*shape, dtype=torch.float32) + channels, 32)


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_large_mean_in_16_bits_is_as_exact_as_the_statistics(dtype: torch.dtype) -> None:
    set_backend("cuda")
    x = on_card(2, 320, 64, 64, mean=100.0, dtype=dtype)
    norm = frozen(32, 320, dtype).cuda()
    y, dx = results(x, torch.ones_like(x), norm, silu=False)
    truth = results(x.double(), torch.ones_like(x).double(), norm.double(), False, op=eager)
    assert error(y, truth[0]) <= ulp(truth[0], dtype)  # eager's mean is rounded to 16 bits
    assert error(dx, truth[1]) <= ulp(truth[1], dtype)


@gpu
def test_one_pixel_far_from_all_others() -> None:
    x = on_card(1, 320, 64, 64, dtype=torch.float32)
    for place in ((0, 0), (63, 63), (17, 5)):
        spoiled = x.clone(memory_format=torch.channels_last)
        spoiled[:, :, *place] += 300.0
        check(spoiled, 32)


@gpu
def test_a_constant_map_has_the_bias_as_its_result() -> None:
    set_backend("cuda")
    norm = frozen(32, 320, torch.float32).cuda()
    x = torch.full((2, 320, 9, 9), 1234.5, device="cuda").contiguous(
        memory_format=torch.channels_last
    )
    y, truth = group_norm_silu(x, norm, silu=False), norm.bias[:, None, None]
    eager = F.group_norm(x, 32, norm.weight, norm.bias, norm.eps)
    assert (y - truth).abs().max() <= 2 * (eager - truth).abs().max() + 1e-5


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_maps_that_lie_otherwise(dtype: torch.dtype) -> None:
    set_backend("cuda")
    norm = frozen(32, 320, dtype).cuda()
    x, dy = (on_card(3, 320, 9, 11, dtype=dtype) for _ in range(2))
    wide = on_card(3, 480, 9, 13, dtype=dtype)[:, 72:392, :, 1:12].copy_(x)
    shifted = torch.empty(x.numel() + 1, device="cuda", dtype=dtype)[1:]
    shifted = shifted.view(3, 9, 11, 320).permute(0, 3, 1, 2).copy_(x)
    expected = results(x, dy, norm, True)
    flat = dy.mean((2, 3), keepdim=True)
    for other in (wide, shifted):
        assert all(map(torch.equal, results(other, dy.contiguous(), norm, True), expected))
        of_expanded = results(other, flat.expand_as(dy), norm, True)
        of_dense = results(x, flat.expand_as(dy).contiguous(), norm, True)
        assert all(map(torch.equal, of_expanded, of_dense))


@gpu
def test_a_map_that_lies_channel_by_channel_goes_to_the_reference() -> None:
    said: list[str] = []
    set_backend("auto", said.append)
    norm = frozen(32, 320, torch.float32).cuda()
    x = torch.randn(2, 320, 9, 11, device="cuda", requires_grad=True)
    y = group_norm_silu(x, norm)
    assert y.is_contiguous() and torch.autograd.grad(y.sum(), x)[0].is_contiguous()
    torch.testing.assert_close(y, eager(x, norm, True))
    assert any(
        "group_norm_silu: PyTorch's own" in line and "pixel by pixel" in line for line in said
    )


@gpu
@pytest.mark.parametrize("shape", [(4, 320, 128, 128), (1, 1280, 32, 32)], ids=str)
def test_the_kernels_give_the_same_bits_twice_and_in_a_graph(shape: tuple[int, ...]) -> None:
    set_backend("cuda")
    norm = frozen(32, shape[1], torch.bfloat16).cuda()
    x, dy = (on_card(*shape, dtype=torch.bfloat16) for _ in range(2))
    first, again = (results(x, dy, norm, True) for _ in range(2))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results(x, dy, norm, True)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(x, dy, norm, True)
    graph.replay()
    for once, twice, in_graph in zip(first, again, captured, strict=True):
        assert torch.equal(once, twice) and torch.equal(once, in_graph)


@gpu
def test_bandwidth() -> None:
    loaded()
    copied = copy_bandwidth()
    print(f"\na copy moves {copied / 1e12:.2f} TB/s; bytes: 4 an element forward, 6 backward")
    for shape in REAL:
        norm = frozen(32, shape[1], torch.bfloat16).cuda()
        arguments = (norm.weight, norm.bias, 32)
        pairs = [[on_card(*shape, dtype=torch.bfloat16) for _ in range(2)] for _ in range(4)]
        kept = [torch.ops.eri.group_norm_silu(x, *arguments, 1e-5, True)[1] for x, _ in pairs]

        def forward(i: int, pairs=pairs, arguments=arguments) -> Tensor:
            return torch.ops.eri.group_norm_silu(pairs[i][0], *arguments, 1e-5, True)[0]

        def backward(i: int, pairs=pairs, arguments=arguments, kept=kept) -> Tensor:
            x, dy = pairs[i]
            return torch.ops.eri.group_norm_silu_backward(dy, x, kept[i], *arguments, True)

        def eager_both(i: int, pairs=pairs, norm=norm) -> tuple[Tensor, Tensor]:
            return results(*pairs[i], norm, True, op=eager)

        def eager_forward(i: int, pairs=pairs, norm=norm) -> Tensor:
            return eager(pairs[i][0], norm, True)

        both = microseconds(eager_both)
        of_eager = microseconds(eager_forward)
        for name, size, again, ours, theirs in (
            ("forward", 4, 2, microseconds(forward), of_eager),
            ("backward", 6, 4, microseconds(backward), both - of_eager),
        ):
            elements = torch.Size(shape).numel()
            reached = size * elements / ours * 1e6
            print(
                f"{shape!s:20} {name:8}: {ours:6.1f} us, {reached / 1e12:.2f} TB/s, "
                f"eager {theirs:6.1f} us"
            )
            if elements > 2**24:  # x and dy are read twice, and miss the cache
                assert reached * (size + again) / size > 0.6 * copied

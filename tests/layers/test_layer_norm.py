from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eri.errors import ConfigError
from eri.layers import LayerNorm
from eri.layers.backend import set_backend
from eri.layers.build import SOURCES
from eri.layers.layer_norm import (
    MOST_VECTORS,
    add_layer_norm,
    add_layer_norm_reference,
    layer_norm,
    layer_norm_backward,
    layer_norm_backward_reference,
    layer_norm_reference,
    unsupported,
)
from eri.layers.vectors import aligned_rows
from tests.kernel_checks import (
    WITHOUT_VALUES,
    copy_bandwidth,
    error,
    microseconds,
    poison,
    ulp,
    with_gaps,
)

TYPES = [torch.float32, torch.float16, torch.bfloat16]


def norm_of(
    width: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> LayerNorm:
    norm = LayerNorm(width, 1e-5, device=device).requires_grad_(False)
    norm.weight.normal_(1, 0.3)
    norm.bias.normal_(0, 0.3)
    return norm.to(dtype)


def test_it_is_a_layer_norm_with_the_numbers_of_each_row() -> None:
    norm, x = norm_of(6), 3 * torch.randn(2, 5, 6, dtype=torch.float64) + 1
    n, mean_rstd = layer_norm(x, norm)
    torch.testing.assert_close(n, norm(x))
    torch.testing.assert_close(mean_rstd[:, 0], x.mean(-1).flatten())
    rstd = (x.var(-1, correction=0) + norm.eps).rsqrt()
    torch.testing.assert_close(mean_rstd[:, 1], rstd.flatten())


def gradient(dn: Tensor, x: Tensor, *rest: Any) -> Tensor:
    """Of x; what comes beside it is checked."""
    dx, n = layer_norm_backward(dn, x, *rest)
    again = layer_norm(x, rest[1])[0].reshape(-1, x.shape[-1])
    assert torch.equal(n, again) or n.isnan().any()
    return dx


@pytest.mark.parametrize("residual", [True, False])
def test_the_backward_pass_is_autograds(residual: bool) -> None:
    norm = norm_of(6)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    dn, added = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    kept = added.clone()
    (expected,) = torch.autograd.grad(norm(x), x, dn)
    _, mean_rstd = layer_norm(x.detach(), norm)
    given = added if residual else None
    found = gradient(dn.flatten(0, 1), x.detach(), mean_rstd, norm, given)
    torch.testing.assert_close(found, expected + added if residual else expected)
    assert torch.equal(added, kept)


@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 32), (16,)])
def test_the_ops_are_registered_as_pytorch_wants_them(
    shape: tuple[int, ...], device: torch.device
) -> None:
    if device.type == "cuda":
        loaded()
    norm = norm_of(shape[-1], torch.float32, device)
    x, dn, residual = torch.randn(3, *shape, device=device)
    affine = (norm.weight, norm.bias, 1e-5)
    _, mean_rstd = torch.ops.eri.layer_norm(x, *affine, 0)
    calls = [
        (torch.ops.eri.layer_norm.default, (x, *affine)),
        (torch.ops.eri.add_layer_norm.default, (x, residual, *affine)),
        (torch.ops.eri.layer_norm_backward.default, (dn, x, mean_rstd, *affine[:2], None)),
        (torch.ops.eri.layer_norm_backward.default, (dn, x, mean_rstd, *affine[:2], residual)),
    ]
    for op, given in calls:
        torch.library.opcheck(op, (*given, 0))
        torch.library.opcheck(op, (*given, 8), test_utils=WITHOUT_VALUES)


def test_a_sum_and_its_norm() -> None:
    norm = norm_of(6)
    x, added = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    total, n, mean_rstd = add_layer_norm(x, added.flatten(0, 1), norm)
    assert torch.equal(total, x + added)
    for found, expected in zip((n, mean_rstd), layer_norm(x + added, norm), strict=True):
        assert torch.equal(found, expected)


def test_a_tail_is_left_behind_each_row(device: torch.device) -> None:
    if device.type == "cuda":
        loaded()
    norm = norm_of(16, torch.float32, device)
    x, dn, residual = torch.randn(3, 2, 3, 16, device=device)
    with poison():
        n, mean_rstd = layer_norm(x, norm, 8)
        total, of_total, _ = add_layer_norm(x, with_gaps(residual.flatten(0, 1), 8), norm, 4)
        apart = with_gaps(dn.flatten(0, 1), 4), x, mean_rstd, norm, with_gaps(residual, 8)
        dx = gradient(*apart, 12)
    assert total.shape == x.shape and torch.equal(total, x + residual)
    for wide, narrow in (
        (n, layer_norm(x, norm)[0]),
        (of_total, layer_norm(total, norm)[0]),
        (dx, gradient(dn, x, mean_rstd, norm, residual)),
    ):
        assert wide.shape[0] == 6 and wide.shape[1] > 16
        assert torch.equal(wide[:, :16], narrow.flatten(0, 1)) and wide[:, 16:].isnan().all()


def test_reasons_are_in_words() -> None:
    def reason(width: int, dtype: torch.dtype, of_weight: torch.dtype | None = None) -> str | None:
        weight = torch.ones(width, dtype=of_weight or dtype)
        return unsupported(torch.zeros(2, width, dtype=dtype), weight)

    assert reason(1280, torch.float32) is None
    assert reason(2560, torch.bfloat16) is None
    rows = "x has rows of {} elements, not a multiple of {} up to {}"
    assert reason(1284, torch.float32) == rows.format(1284, 4, 1280)
    assert reason(12, torch.float16) == rows.format(12, 8, 2560)
    assert reason(8, torch.float64) == "x is float64, not float32, float16 or bfloat16"
    found = reason(8, torch.bfloat16, torch.float32)
    assert found == "x is bfloat16, and its weight float32"
    assert unsupported(torch.zeros(0, 8), torch.ones(8)) == "x has 0 rows, not 1 to 2147483647"
    half = torch.zeros(2, 8, dtype=torch.float16)
    assert unsupported(half, half[0], 24) is None
    assert unsupported(half, half[0], 4) == "a tail of 4 elements is no multiple of 8"
    assert unsupported(half, half[0], -8) == "a tail of -8 elements is no multiple of 8"


def test_the_limit_is_that_of_the_header() -> None:
    assert f"kLayerNormVectors = {MOST_VECTORS};" in (SOURCES / "layer_norm.h").read_text()


def test_the_backend_cuda_refuses_other_devices() -> None:
    set_backend("cuda")
    with pytest.raises(ConfigError, match="this is cpu"):
        layer_norm(torch.zeros(2, 16), norm_of(16, torch.float32))


# ------------------------------------------------------------------------------------- the kernels

gpu = pytest.mark.gpu
SHAPES = [(1024, 1280), (2, 4096, 640), (3, 77, 320), (7, 8), (1, 1032), (513, 2560), (5, 256)]


def loaded() -> None:
    """Builds and loads the kernels and refuses anything else."""
    set_backend("cuda")
    layer_norm(torch.ones(1, 16, device="cuda"), norm_of(16, torch.float32, "cuda"))


@gpu
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_are_no_less_exact_than_eager(
    shape: tuple[int, ...], dtype: torch.dtype, offset: float
) -> None:
    set_backend("cuda")
    if dtype == torch.float32 and shape[-1] > 1280:
        shape = (*shape[:-1], 1280)
    norm = norm_of(shape[-1], dtype, "cuda")
    x = (3 * torch.randn(shape, device="cuda") + offset).to(dtype)
    dn, residual = torch.randn(2, *shape, device="cuda").to(dtype)
    exact = norm_of(shape[-1], torch.float64, "cuda")
    exact.load_state_dict({k: v.double() for k, v in norm.state_dict().items()})
    truth, moments = layer_norm_reference(x.double(), exact.weight, exact.bias, exact.eps)
    n, mean_rstd = layer_norm(x, norm)
    eager, of_eager = layer_norm_reference(x, norm.weight, norm.bias, norm.eps)
    assert n.dtype == dtype and n.shape == truth.shape and mean_rstd.dtype == torch.float32
    assert error(n, truth) <= 2 * error(eager, truth) + ulp(truth, dtype)
    single = torch.float32
    assert error(mean_rstd, moments) <= 2 * error(of_eager, moments) + 2 * ulp(moments, single)
    for added in (None, residual):
        true = None if added is None else added.double()
        truth = layer_norm_backward_reference(dn.double(), x.double(), moments, exact.weight, true)
        found = gradient(dn, x, mean_rstd, norm, added)
        eager = layer_norm_backward_reference(dn, x, of_eager, norm.weight, added)
        assert found.dtype == dtype and found.shape == truth.shape
        assert error(found, truth) <= 2 * error(eager, truth) + ulp(truth, dtype)


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rows_that_lie_otherwise(dtype: torch.dtype) -> None:
    set_backend("cuda")
    norm = norm_of(64, dtype, "cuda")
    x, dn = torch.randn(2, 9, 5, 64, device="cuda").to(dtype)
    n, mean_rstd = layer_norm(x, norm)
    dx = gradient(dn, x, mean_rstd, norm, x)
    shifted = torch.empty(x.numel() + 1, device="cuda", dtype=dtype)[1:].view(x.shape).copy_(x)
    wide = torch.empty(9, 5, 80, device="cuda", dtype=dtype)[..., 8:72].copy_(x)
    for like_x in (shifted, wide, x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(layer_norm(like_x, norm)[0], n)
        assert torch.equal(gradient(dn, like_x, mean_rstd, norm, like_x), dx)


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sum_is_added_and_normalised_as_exactly_as_by_eager(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    set_backend("cuda")
    if dtype == torch.float32 and shape[-1] > 1280:
        shape = (*shape[:-1], 1280)
    norm = norm_of(shape[-1], dtype, "cuda")
    affine = norm.weight, norm.bias
    x, added = (3 * torch.randn(2, *shape, device="cuda") + 1).to(dtype)
    total, *found = add_layer_norm(x, added, norm)
    assert torch.equal(total, x + added)
    for one, other in zip(found, layer_norm(total, norm), strict=True):
        assert torch.equal(one, other)
    exact = norm.weight.double(), norm.bias.double()
    _, truth, _ = add_layer_norm_reference(x.double(), added.double(), *exact, norm.eps)
    _, eager, _ = add_layer_norm_reference(x, added, *affine, norm.eps)
    assert error(found[0], truth) <= 2 * error(eager, truth) + ulp(truth, dtype)


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_tails_and_gaps_change_no_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    set_backend("cuda")
    if dtype == torch.float32 and shape[-1] > 1280:
        shape = (*shape[:-1], 1280)
    norm = norm_of(shape[-1], dtype, "cuda")
    x, dn, residual = torch.randn(3, *shape, device="cuda").to(dtype)
    n, mean_rstd = layer_norm(x, norm)
    total, of_total, _ = add_layer_norm(x, residual, norm)
    dx = gradient(dn, x, mean_rstd, norm, residual)
    for tail, gap in ((8, 16), (24, 8), (64, 72)):
        apart = [with_gaps(rows, k * gap) for k, rows in enumerate((x, dn, residual), 1)]
        assert all(aligned_rows(rows) is rows for rows in apart)
        x_apart, dn_apart, residual_apart = apart
        with poison():
            tailed, _ = layer_norm(x_apart, norm, tail)
            summed, of_summed, _ = add_layer_norm(x_apart, residual_apart, norm, tail)
            d_tailed = gradient(dn_apart, x_apart, mean_rstd, norm, residual_apart, tail)
        assert torch.equal(summed, total)
        for wide, narrow in ((tailed, n), (of_summed, of_total), (d_tailed, dx)):
            assert wide.shape == (x.numel() // shape[-1], shape[-1] + tail)
            assert torch.equal(wide[:, :-tail], narrow.flatten(0, -2))
            assert wide[:, -tail:].isnan().all()


@gpu
def test_what_is_not_finite_stays_in_its_row() -> None:
    set_backend("cuda")
    x = torch.randn(3, 16, device="cuda", dtype=torch.bfloat16)
    x[1, 4] = torch.nan
    n, mean_rstd = layer_norm(x, norm_of(16, torch.bfloat16, "cuda"))
    assert n[1].isnan().all() and mean_rstd[1].isnan().all()
    assert n[[0, 2]].isfinite().all() and mean_rstd[[0, 2]].isfinite().all()


@gpu
def test_the_kernels_give_the_same_bits_twice_and_in_a_graph() -> None:
    set_backend("cuda")
    norm = norm_of(1280, torch.bfloat16, "cuda")
    x, dn = torch.randn(2, 1025, 1280, device="cuda").bfloat16()

    def both() -> list[Tensor]:
        n, mean_rstd = layer_norm(x, norm)
        total, of_total, _ = add_layer_norm(x, dn, norm, 16)
        back = layer_norm_backward(dn, x, mean_rstd, norm, x)
        return [n, mean_rstd, total, of_total[:, :-16], *back]

    first = both()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    graph.replay()
    for once, again, in_graph in zip(first, both(), captured, strict=True):
        assert torch.equal(once, again) and torch.equal(once, in_graph)


@gpu
def test_what_the_kernels_cannot_do_the_reference_does() -> None:
    said: list[str] = []
    set_backend("auto", said.append)
    norm, x = norm_of(10, torch.float64, "cuda"), torch.randn(3, 10, device="cuda").double()
    torch.testing.assert_close(
        layer_norm(x, norm)[0], F.layer_norm(x, (10,), norm.weight, norm.bias)
    )
    assert any("layer_norm: PyTorch's own operations" in line for line in said)


@gpu
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("weight", lambda x: torch.ones(12, device=x.device, dtype=x.dtype)),
        ("weight", lambda x: torch.ones(16, device=x.device)),
        ("bias", lambda x: torch.ones(16, dtype=x.dtype)),
        ("x", lambda x: x.t().contiguous().t()),
        ("x", lambda x: x.double()),
    ],
)
def test_the_kernel_names_what_it_cannot_take(name: str, wrong: Callable[[Tensor], Tensor]) -> None:
    loaded()
    x = torch.zeros(4, 16, device="cuda", dtype=torch.bfloat16)
    given = {"x": x, "weight": torch.ones_like(x[0]), "bias": torch.ones_like(x[0])}
    given[name] = wrong(x)
    with pytest.raises(RuntimeError, match=rf"layer_norm: {name}"):
        torch.ops.eri.layer_norm(*given.values(), 1e-5, 0)


@gpu
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dn": lambda x: x.half()}, "dn is of type Half"),
        ({"dn": lambda x: x[:3]}, "dn has 48 elements, expected 4 rows of 16"),
        ({"dn": lambda x: with_gaps(x, 4)}, "dn has no rows at one stride"),
        ({"residual": lambda x: x.view(2, 2, 16).mT.contiguous().mT}, "residual has no rows"),
        ({"residual": lambda x: with_gaps(x, 8).cpu()}, "residual is not on cuda:0"),
        ({"tail": lambda _: 4}, "tail is 4 elements, expected a multiple of 8"),
        ({"tail": lambda _: -8}, "tail is -8 elements"),
    ],
)
def test_the_kernel_names_what_it_cannot_take_back(
    changed: dict[str, Callable[[Tensor], object]], message: str
) -> None:
    loaded()
    x = torch.zeros(4, 16, device="cuda", dtype=torch.bfloat16)
    moments = torch.zeros(4, 2, device="cuda")
    given = {"dn": x, "x": x, "moments": moments, "weight": x[0]}
    given |= {"bias": x[0], "residual": x, "tail": 0}
    for name, change in changed.items():
        given[name] = change(x)
    with pytest.raises(RuntimeError, match=f"layer_norm: {message}"):
        torch.ops.eri.layer_norm_backward(*given.values())


@gpu
def test_bandwidth() -> None:
    set_backend("cuda")
    copied = copy_bandwidth()
    print(f"\na copy moves {copied / 1e12:.2f} TB/s")
    for rows, width in ((1024, 1280), (4096, 1280), (4096, 640), (16384, 640), (65536, 640)):
        norm = norm_of(width, torch.bfloat16, "cuda")
        sets = [torch.randn(3, rows, width, device="cuda").bfloat16() for _ in range(4)]
        kept = [layer_norm(x, norm)[1] for x, _, _ in sets]
        theirs = [layer_norm_reference(x, norm.weight, norm.bias, 1e-5)[1] for x, _, _ in sets]
        cases = [
            (
                *("forward", 4, lambda i, n=norm, s=sets: layer_norm(s[i][0], n)),
                lambda i, n=norm, s=sets: torch.native_layer_norm(
                    s[i][0], (s[i].shape[-1],), n.weight, n.bias, 1e-5
                ),
            ),
            (
                *("sum", 8, lambda i, n=norm, s=sets: add_layer_norm(s[i][0], s[i][2], n)),
                lambda i, n=norm, s=sets: add_layer_norm_reference(
                    s[i][0], s[i][2], n.weight, n.bias, 1e-5
                ),
            ),
            (
                *(
                    "backward, and a residual",
                    10,
                    lambda i, n=norm, s=sets, k=kept: layer_norm_backward(
                        s[i][1], s[i][0], k[i], n, s[i][2]
                    ),
                ),
                lambda i, n=norm, s=sets, k=theirs: layer_norm_backward_reference(
                    s[i][1], s[i][0], k[i], n.weight, s[i][2]
                ),
            ),
        ]
        for name, size, kernel, eager in cases:
            ours, others = microseconds(kernel), microseconds(eager)
            reached = size * rows * width / ours * 1e6
            print(
                f"{rows:6d} x {width} {name}: {ours:7.1f} us, {reached / 1e12:.2f} TB/s, "
                f"eager {others:7.1f} us"
            )
            if rows * width >= 2**25:
                assert reached > 0.7 * copied

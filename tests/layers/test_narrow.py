"""Norms with a narrow product are the two of them, one after the other."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from eri.layers.backend import set_backend
from eri.layers.build import SOURCES
from eri.layers.layer_norm import add_layer_norm
from eri.layers.lora_products import Narrow, lora_down
from eri.layers.narrow import (
    MOST_RANKS,
    MOST_WIDTH,
    add_layer_norm_narrow,
    layer_norm_backward_narrow,
)
from tests.kernel_checks import (
    WITHOUT_VALUES,
    copy_bandwidth,
    error,
    microseconds,
    poison,
    ulp,
    with_gaps,
)

TYPES = [torch.float16, torch.bfloat16]
CASES = ["norm", "norm backward"]


def case(
    name: str,
    rows: int,
    width: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> tuple[Callable[[Narrow | None], tuple[Tensor | None, ...]], int]:
    """The two as one, and which of its results has the tail."""

    def random() -> Tensor:
        return with_gaps(torch.randn(rows, width, device=device).to(dtype), 8)

    norm = nn.LayerNorm(width, device=device).to(dtype).requires_grad_(False)
    for parameter in norm.parameters():
        parameter.data.normal_()
    x, other, residual = random(), random(), random()
    if name == "norm":
        return lambda narrow: add_layer_norm_narrow(x, other, norm, narrow), 1
    total, _, moments = add_layer_norm(x, residual, norm)
    return (
        lambda narrow: layer_norm_backward_narrow(other, total, moments, norm, residual, narrow),
        0,
    )


def narrow_of(
    ranks: int, width: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Narrow:
    down = torch.randn(ranks, width + 8, device=device).to(dtype)[:, :width]
    return Narrow(down, 1, 0.75)


@pytest.mark.parametrize("name", CASES)
def test_they_are_one_after_the_other(name: str) -> None:
    width = 16
    run, place = case(name, 5, width)
    narrow = narrow_of(8, width, torch.float64)
    *found, h = run(narrow)
    *expected, nothing = run(None)
    rows = found[place]
    assert nothing is None and h is not None and rows is not None
    assert rows.shape == (5, width + 8)
    assert torch.equal(rows[:, width:], h)
    torch.testing.assert_close(h, 0.75 * rows[:, :width] @ narrow.down.T)
    found[place] = rows[:, :width]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_the_limits_are_those_of_the_headers() -> None:
    assert f"kNarrowRanks = {MOST_RANKS};" in (SOURCES / "narrow_arguments.h").read_text()
    vectors = f"kLayerNormNarrowVectors = {MOST_WIDTH // 8};"
    assert vectors in (SOURCES / "layer_norm.h").read_text()


def test_the_ops_are_registered_as_pytorch_wants_them(device: torch.device) -> None:
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16
        set_backend("cuda")
        lora_down(torch.zeros(1, 16, device="cuda"), torch.zeros(8, 16, device="cuda"), 1, 1.0)
    down, x = torch.randn(8, 16, device=device).to(dtype), torch.randn(2, 3, 16, device=device)
    x = x.to(dtype)
    weight, bias, moments = x[0, 0].clone(), x[0, 1].clone(), torch.rand(6, 2, device=device)
    ops, options = torch.ops.eri, {"test_utils": WITHOUT_VALUES}
    norm = x, x, weight, bias, 1e-5, down, 0.5
    torch.library.opcheck(ops.add_layer_norm_narrow.default, norm, **options)
    norm = x, x, moments, weight, bias, x, down, 0.5
    torch.library.opcheck(ops.layer_norm_backward_narrow.default, norm, **options)


# ------------------------------------------------------------------------------------- the kernels

gpu = pytest.mark.gpu
WIDTHS = [8, 24, 40, 320, 640, 648, 1280]


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("ranks", [8, 16, 24, 32, 40, 48])
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_are_no_less_exact_than_one_after_the_other(
    name: str, ranks: int, dtype: torch.dtype
) -> None:
    set_backend("cuda")
    for rows in (1, 7, 8, 77, 1024):
        for width in WIDTHS:
            run, place = case(name, rows, width, dtype, "cuda")
            narrow = narrow_of(ranks, width, dtype, "cuda")
            with poison():
                *found, h = run(narrow)
            *expected, _ = run(None)
            written = found[place]
            assert written is not None and h is not None
            assert torch.equal(written[:, width:], h)
            found[place] = written[:, :width]
            for one, other in zip(found, expected, strict=True):
                assert one is not None and torch.equal(one, other)
            whole = written.clone()
            truth = 0.75 * written[:, :width].double() @ narrow.down.double().T
            apart = lora_down(whole, *narrow)
            assert h.dtype == dtype and h.shape == (rows, ranks)
            assert error(h, truth) <= 2 * error(apart, truth) + ulp(truth, dtype)


@gpu
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_give_the_same_bits_twice_and_in_a_graph(name: str) -> None:
    set_backend("cuda")
    run, _ = case(name, 1000, 640, torch.bfloat16, "cuda")
    narrow = narrow_of(16, 640, torch.bfloat16, "cuda")
    first, again = run(narrow), run(narrow)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(narrow)
    graph.replay()
    for one, other, in_graph in zip(first, again, captured, strict=True):
        assert one is not None and other is not None and in_graph is not None
        assert torch.equal(one, other) and torch.equal(one, in_graph)


@gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("ranks", "dtype"), [(56, torch.bfloat16), (16, torch.float32)])
def test_what_the_kernels_cannot_do_two_kernels_do(
    name: str, ranks: int, dtype: torch.dtype
) -> None:
    set_backend("cuda")  # which refuses PyTorch's own operations
    width = 64
    run, place = case(name, 9, width, dtype, "cuda")
    narrow = narrow_of(ranks, width, dtype, "cuda")
    *found, h = run(narrow)
    rows = found[place]
    assert rows is not None and h is not None
    assert torch.equal(rows[:, width:], h)
    truth = 0.75 * rows[:, :width].double() @ narrow.down.double().T
    assert error(h, truth) <= 4 * ulp(truth, dtype)


@gpu
def test_the_ops_name_what_they_cannot_take() -> None:
    set_backend("cuda")
    x = torch.zeros(2, 16, device="cuda").bfloat16()
    lora_down(x, torch.zeros(8, 16, device="cuda").bfloat16(), 1, 1.0)
    op = torch.ops.eri.add_layer_norm_narrow
    for down, message in (
        (torch.zeros(56, 16), "down has 56 rows, expected a multiple of 8 up to 48"),
        (torch.zeros(8, 24), "down has 192 elements, expected 8 rows of 16"),
        (torch.zeros(4, 16), "down has 4 rows"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(x, x, x[0], x[0], 1e-5, down.cuda().bfloat16(), 1.0)
    with pytest.raises(RuntimeError, match="down is of type Float"):
        op(x, x, x[0], x[0], 1e-5, torch.zeros(8, 16, device="cuda"), 1.0)
    x = torch.zeros(2, 1288, device="cuda").bfloat16()
    down = torch.zeros(8, 1288, device="cuda").bfloat16()
    with pytest.raises(RuntimeError, match="expected at most 1280 with a narrow product"):
        op(x, x, x[0], x[0], 1e-5, down, 1.0)


@gpu
def test_bandwidth() -> None:
    set_backend("cuda")
    best = copy_bandwidth()
    for rows, width in ((4096, 1280), (16384, 640), (1024, 1280)):
        for name, ranks in (("norm", 16), ("norm", 48), ("norm backward", 16)):
            cases = [case(name, rows, width, torch.bfloat16, "cuda") for _ in range(4)]
            narrow = narrow_of(ranks, width, torch.bfloat16, "cuda")
            both = microseconds(lambda i, c=cases, n=narrow: c[i][0](n))
            alone = microseconds(lambda i, c=cases: c[i][0](None))
            spare = torch.randn(rows, width, device="cuda").bfloat16()
            product = microseconds(lambda _, s=spare, n=narrow: lora_down(s, *n))
            size = {"norm": 8, "norm backward": 10}[name] * rows * width
            print(
                f"\n{name} {rows} x {width}, {ranks} ranks: {both:.1f} us, "
                f"{size / both / best * 1e6:.0%} of a copy; apart {alone:.1f} + {product:.1f} us",
                end="",
            )

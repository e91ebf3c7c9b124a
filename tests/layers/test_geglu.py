from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eri.errors import ConfigError
from eri.layers.backend import set_backend
from eri.layers.build import SOURCES
from eri.layers.geglu import (
    MOST_ELEMENTS,
    geglu,
    geglu_backward,
    geglu_backward_reference,
    geglu_reference,
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


def formula(u: Tensor) -> Tensor:
    value, gate = u.chunk(2, dim=-1)
    return value * gate * 0.5 * (1 + torch.erf(gate / 2**0.5))


def test_the_second_half_of_a_row_is_the_gate() -> None:
    u = torch.randn(2, 3, 10, dtype=torch.float64)
    torch.testing.assert_close(geglu(u), formula(u))
    torch.testing.assert_close(geglu(u), u[..., :5] * F.gelu(u[..., 5:]))


def gradient(da: Tensor, u: Tensor, tail: int = 0) -> Tensor:
    """Of u; what comes beside it is checked."""
    du, a = geglu_backward(da, u, tail)
    width = u.shape[-1] // 2
    again = geglu(u).reshape(-1, width)
    assert torch.equal(a, again) or a.isnan().any()
    return du


def test_the_backward_pass_is_autograds() -> None:
    u = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    da = torch.randn(2, 3, 5, dtype=torch.float64)
    (expected,) = torch.autograd.grad(formula(u), u, da)
    torch.testing.assert_close(gradient(da, u.detach()), expected)
    (found,) = torch.autograd.grad(geglu(u), u, da)
    torch.testing.assert_close(found, expected)


def test_the_op_has_the_right_gradient() -> None:
    u = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: torch.ops.eri.geglu(u, 0), (u,))
    assert torch.autograd.gradcheck(lambda u: torch.ops.eri.geglu(u, 2)[:, :4], (u,))


@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 32), (16,), (0, 16)])
def test_the_ops_are_registered_as_pytorch_wants_them(
    shape: tuple[int, ...], device: torch.device
) -> None:
    if device.type == "cuda":
        if 0 in shape:
            pytest.skip("the kernels take no empty input; the reference does")
        loaded()
    u = torch.randn(shape, device=device, requires_grad=True)
    da = torch.randn(*shape[:-1], shape[-1] // 2, device=device)
    forward, backward = torch.ops.eri.geglu.default, torch.ops.eri.geglu_backward.default
    torch.library.opcheck(forward, (u, 0))
    torch.library.opcheck(forward, (u, 8), test_utils=WITHOUT_VALUES)
    torch.library.opcheck(backward, (da, u.detach(), 0))
    torch.library.opcheck(backward, (da, u.detach(), 8), test_utils=WITHOUT_VALUES)


def test_the_ops_give_contiguous_results() -> None:
    u = torch.randn(6, 4).t().unsqueeze(0)
    torch.library.opcheck(torch.ops.eri.geglu.default, (u, 0))
    torch.library.opcheck(torch.ops.eri.geglu_backward.default, (u[..., :3], u, 0))


def test_a_tail_is_left_behind_each_row(device: torch.device) -> None:
    u, da = torch.randn(2, 3, 32, device=device), torch.randn(6, 16, device=device)
    if device.type == "cuda":
        loaded()
    with poison():
        a, du = geglu(u, 4), gradient(with_gaps(da, 4), u, 8)
    assert a.shape == (6, 20) and du.shape == (6, 40)
    assert torch.equal(a[:, :16], geglu(u).flatten(0, 1)) and a[:, 16:].isnan().all()
    assert torch.equal(du[:, :32], gradient(da, u).flatten(0, 1)) and du[:, 32:].isnan().all()


def test_reasons_are_in_words() -> None:
    assert unsupported(torch.zeros(2, 16)) is None
    assert unsupported(torch.zeros(2, 16, dtype=torch.bfloat16)) is None
    assert unsupported(torch.zeros(2, 12)) == "u has rows of 12 elements, not a multiple of 8"
    found = unsupported(torch.zeros(2, 8, dtype=torch.float16))
    assert found == "u has rows of 8 elements, not a multiple of 16"
    found = unsupported(torch.zeros(2, 8, dtype=torch.float64))
    assert found == "u is float64, not float32, float16 or bfloat16"
    assert unsupported(torch.zeros(0, 8)) == "u has 0 elements, not 1 to 17179869183"
    assert unsupported(torch.zeros(2, 16), 4) is None
    found = unsupported(torch.zeros(2, 16, dtype=torch.bfloat16), 4)
    assert found == "a tail of 4 elements is no multiple of 8"


def test_the_limit_is_that_of_the_header() -> None:
    header = (SOURCES / "geglu.h").read_text()
    assert f"kGegluElements = 1LL << {MOST_ELEMENTS.bit_length() - 1};" in header


def test_the_backend_cuda_refuses_other_devices() -> None:
    set_backend("cuda")
    with pytest.raises(ConfigError, match="this is cpu"):
        geglu(torch.zeros(2, 16))


# ------------------------------------------------------------------------------------- the kernels

gpu = pytest.mark.gpu
SHAPES = [(1024, 2 * 5120), (2, 4096, 2 * 2560), (3, 77, 1280), (7, 16), (1, 48), (513, 2 * 1288)]


def loaded() -> None:
    """Builds and loads the kernels and refuses anything else."""
    set_backend("cuda")
    geglu(torch.ones(1, 16, device="cuda"))


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_are_no_less_exact_than_eager(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    set_backend("cuda")
    u = (3 * torch.randn(shape, device="cuda")).to(dtype)
    da = torch.randn(*shape[:-1], shape[-1] // 2, device="cuda").to(dtype)
    truth = geglu_reference(u.double())
    found = geglu(u)
    assert found.dtype == dtype and found.shape == truth.shape and found.is_contiguous()
    assert error(found, truth) <= 2 * error(geglu_reference(u), truth) + ulp(truth, dtype)
    truth = geglu_backward_reference(da.double(), u.double())
    found = gradient(da, u)
    assert found.dtype == dtype and found.shape == truth.shape and found.is_contiguous()
    eager = geglu_backward_reference(da, u)
    for part, of_eager, true in zip(*(t.chunk(2, -1) for t in (found, eager, truth)), strict=True):
        assert error(part, true) <= 2 * error(of_eager, true) + ulp(true, dtype)


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_gate_is_exact_to_its_last_place(dtype: torch.dtype) -> None:
    set_backend("cuda")
    bits = torch.arange(-(2**15), 2**15, device="cuda").to(torch.int16)
    gates = bits.view(dtype)
    gates = gates[gates.isfinite() & (gates > -6)]  # below, all that is left is under 1e-8
    gates = torch.cat([gates, gates.new_zeros(-len(gates) % 8)])
    u = torch.cat([torch.ones_like(gates), gates]).unsqueeze(0)
    found, truth = geglu(u)[0].double(), F.gelu(gates.double())
    # half a unit is the cast's; nothing below the smallest normal number is promised
    allowed = 0.52 * torch.finfo(dtype).eps * truth.abs() + torch.finfo(dtype).smallest_normal
    wrong = (found - truth).abs() > allowed
    assert not wrong.any(), f"{gates[wrong][:8]}: {found[wrong][:8]}, not {truth[wrong][:8]}"


@gpu
def test_what_is_not_finite_stays_so() -> None:
    set_backend("cuda")
    u = torch.ones(1, 16, device="cuda", dtype=torch.bfloat16)
    u[0, 8], u[0, 9], u[0, 0] = torch.inf, torch.nan, 2.0
    a = geglu(u)
    assert a[0, 0] == torch.inf and a[0, 1].isnan() and a[0, 2:].isfinite().all()


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rows_that_lie_otherwise(dtype: torch.dtype) -> None:
    set_backend("cuda")
    u = torch.randn(9, 5, 64, device="cuda", dtype=dtype)
    da = torch.randn(9, 5, 32, device="cuda", dtype=dtype)
    shifted = torch.empty(u.numel() + 1, device="cuda", dtype=dtype)[1:].view(u.shape)
    shifted.copy_(u)
    wide = torch.empty(9, 5, 80, device="cuda", dtype=dtype)[..., 8:72]
    wide.copy_(u)
    other = da.transpose(0, 1).contiguous().transpose(0, 1)
    for like_u in (shifted, wide, u.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(geglu(like_u), geglu(u))
        assert torch.equal(gradient(other, like_u), gradient(da, u))


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(1024, 2 * 5120), (3, 77, 1280), (7, 16), (1, 48)])
def test_tails_and_gaps_change_no_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    set_backend("cuda")
    u = torch.randn(shape, device="cuda").to(dtype)
    da = torch.randn(*shape[:-1], shape[-1] // 2, device="cuda").to(dtype)
    a, du = geglu(u).flatten(0, -2), gradient(da, u).flatten(0, -2)
    for tail, gap in ((8, 16), (24, 8), (128, 136)):
        apart = with_gaps(u, gap), with_gaps(da.flatten(0, -2), 2 * gap)
        assert all(aligned_rows(rows) is rows for rows in apart)
        with poison():
            found = geglu(apart[0], tail), gradient(apart[1], apart[0], tail)
        for wide, narrow in zip(found, (a, du), strict=True):
            assert wide.shape == (len(narrow), narrow.shape[1] + tail)
            assert torch.equal(wide[:, :-tail], narrow) and wide[:, -tail:].isnan().all()


@gpu
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda u, da: (da.half(), u, 0), "da is of type Half"),
        (lambda u, da: (da[:2], u, 0), "da has 32 elements, expected 4 rows of 16"),
        (lambda u, da: (with_gaps(da, 4), u, 0), "da has no rows at one stride"),
        (lambda u, da: (da, u.t().contiguous().t(), 0), "u has no rows at one stride"),
        (lambda u, da: (da, u, 4), "tail is 4 elements, expected a multiple of 8"),
        (lambda u, da: (da, u, -8), "tail is -8 elements"),
    ],
)
def test_the_kernel_names_what_it_cannot_take(
    wrong: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, int]], message: str
) -> None:
    loaded()
    u, da = (torch.zeros(4, width, device="cuda", dtype=torch.bfloat16) for width in (32, 16))
    with pytest.raises(RuntimeError, match=f"geglu: {message}"):
        torch.ops.eri.geglu_backward(*wrong(u, da))


@gpu
def test_the_kernels_give_the_same_bits_twice_and_in_a_graph() -> None:
    set_backend("cuda")
    u = torch.randn(1025, 2 * 2560, device="cuda", dtype=torch.bfloat16)
    da = torch.randn(1025, 2560, device="cuda", dtype=torch.bfloat16)

    def both() -> tuple[Tensor, ...]:
        return geglu(u, 16)[:, :-16], *geglu_backward(da, u)

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
    u = torch.randn(3, 10, device="cuda", dtype=torch.float64)
    torch.testing.assert_close(geglu(u), geglu_reference(u))
    assert any("geglu: PyTorch's own operations" in line and "float64" in line for line in said)


@gpu
def test_bandwidth() -> None:
    set_backend("cuda")
    copied = copy_bandwidth()
    print(f"\na copy moves {copied / 1e12:.2f} TB/s")
    for rows, width in ((1024, 5120), (4096, 5120), (4096, 2560), (16384, 2560)):
        us = [torch.randn(rows, 2 * width, device="cuda").bfloat16() for _ in range(4)]
        das = [torch.randn(rows, width, device="cuda").bfloat16() for _ in range(4)]
        cases: list[tuple[str, int, Callable[[int], object], Callable[[int], object]]] = [
            ("forward", 6, lambda i, us=us: geglu(us[i]), lambda i, us=us: geglu_reference(us[i])),
            (
                "backward",
                12,
                lambda i, us=us, das=das: geglu_backward(das[i], us[i]),
                lambda i, us=us, das=das: geglu_backward_reference(das[i], us[i]),
            ),
        ]
        for name, size, kernel, eager in cases:
            ours, theirs = microseconds(kernel), microseconds(eager)
            reached = size * rows * width / ours * 1e6
            print(
                f"{rows:6d} x {width} {name:8s}: {ours:7.1f} us, {reached / 1e12:.2f} TB/s, "
                f"eager {theirs:7.1f} us"
            )
            if rows * width >= 2**24:
                assert reached > 0.7 * copied

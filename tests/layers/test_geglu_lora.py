"""The gate's backward pass with gradients beside it is one after the other."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eri.layers.backend import set_backend
from eri.layers.build import SOURCES
from eri.layers.geglu import geglu_backward
from eri.layers.geglu_lora import (
    MOST_RANKS,
    MOST_ROWS,
    geglu_backward_lora,
    geglu_backward_lora_reference,
    unsupported,
)
from eri.layers.lora_products import Gradient, Narrow, lora_down, lora_gradients
from tests.kernel_checks import (
    copy_bandwidth,
    error,
    microseconds,
    ops_on_cpu,
    poison,
    ulp,
    with_gaps,
)

TYPES = [torch.float16, torch.bfloat16]
SCALE = 0.75


@dataclass
class Case:
    """What `geglu_backward_lora` takes."""

    da: Tensor
    u: Tensor
    p: Tensor
    h: Tensor
    d_down: Tensor
    d_up: Tensor
    up: Tensor

    def to(self, dtype: torch.dtype) -> "Case":
        """The same numbers in another type, sums included; without what pads ranks."""
        out, inner = len(self.d_down), self.d_up.shape[1]
        small = self.p[:, :out], self.h[:, :inner]
        rest = self.d_down, self.d_up, self.up
        da, u, p, h, d_down, d_up, up = (t.to(dtype) for t in (self.da, self.u, *small, *rest))
        return Case(da, u, p, h, d_down, d_up, up)

    def run(
        self,
        work: Callable[..., tuple[Tensor, Tensor]] = lambda *given: geglu_backward_lora(
            *given[:-2], Narrow(given[-2], 1, given[-1])
        ),
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """du, P and both sums, which are added to copies."""
        own = replace(self, d_down=self.d_down.clone(), d_up=self.d_up.clone())
        du, p = work(*given(own))
        return du, p, own.d_down, own.d_up


def given(c: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float]:
    return c.da, c.u, c.p, c.h, c.d_down, c.d_up, c.up, SCALE


def padded(rank: int) -> int:
    return (rank + 7) // 8 * 8


def case(
    tokens: int,
    width: int,
    out_rank: int,
    in_rank: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cuda",
) -> Case:
    """Sums are there already; between rows, and where ranks are padded, is NaN."""

    def matrix(columns: int, kept: int | None = None) -> Tensor:
        found = with_gaps(torch.randn(tokens, columns, device=device).to(dtype), 8)
        if kept is not None:
            found[:, kept:] = torch.nan
        return found

    small = matrix(padded(out_rank), out_rank), matrix(padded(in_rank), in_rank)
    kept = torch.promote_types(dtype, torch.float32)
    d_down = torch.randn(out_rank, width, device=device).to(kept)
    d_up = torch.randn(2 * width, in_rank, device=device).to(kept)
    up = torch.zeros(padded(in_rank), 2 * width + 8, device=device, dtype=dtype)[:, : 2 * width]
    up[:in_rank].normal_()
    return Case(matrix(width), 2 * matrix(2 * width), *small, d_down, d_up, up)


def test_they_are_what_autograd_gives() -> None:
    c = case(11, 16, 3, 8, device="cpu")
    a_in = torch.randn(8, 5, dtype=torch.float64)
    b_in = torch.randn(32, 8, dtype=torch.float64, requires_grad=True)
    a_out = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    b_out = torch.randn(16, 3, dtype=torch.float64)
    x = torch.randn(11, 5, dtype=torch.float64)
    h = x @ a_in.T
    u = c.u + h @ b_in.T
    value, gate = u.chunk(2, dim=1)
    a = value * F.gelu(gate)
    y = a @ a_out.T @ b_out.T  # all that the layer's base adds has no gradient of A
    dy = torch.randn_like(y)
    da, expected_down, expected_up = torch.autograd.grad(y, (a, a_out, b_in), dy)
    p = torch.full((11, 8), torch.nan, dtype=torch.float64)
    p[:, :3] = dy @ b_out
    c = Case(da, u.detach(), p, h, c.d_down, c.d_up, b_in.detach().T)
    du, p, d_down, d_up = c.run()
    torch.testing.assert_close(d_down, c.d_down + expected_down)
    torch.testing.assert_close(d_up, c.d_up + expected_up)
    assert torch.equal(du[:, :32], geglu_backward(da, u.detach())[0])
    assert torch.equal(du[:, 32:], p)
    torch.testing.assert_close(p, SCALE * du[:, :32] @ b_in)


def test_the_op_is_registered_as_pytorch_wants_it(device: torch.device) -> None:
    c = case(5, 16, 8, 8, torch.bfloat16, device)
    op = torch.ops.eri.geglu_backward_lora.default
    if device.type == "cuda":
        loaded()
    else:
        c = case(5, 16, 8, 8, torch.float32, device)
    torch.library.opcheck(op, given(c))


def test_the_op_on_the_cpu_is_its_reference() -> None:
    c = case(5, 16, 8, 8, torch.bfloat16, "cpu")
    expected = c.run()
    with ops_on_cpu():
        found = c.run()
    torch.testing.assert_close(found, expected)


def test_reasons_are_in_words() -> None:
    c = case(5, 16, 8, 8, torch.bfloat16, "cpu")

    def reason(**others: Tensor) -> str | None:
        return unsupported(*given(replace(c, **others))[:-1])

    assert reason() is None
    assert reason(u=c.u.float()) == "rows are not float16 or bfloat16"
    assert reason(u=c.u[:, :24]) == "u has rows of 24 elements, not a multiple of 16"
    found = reason(p=torch.zeros(5, 24).bfloat16())
    assert found == "p has 24 columns, not at most 16"
    assert reason(h=c.h.half()) == "u is bfloat16, and p float16"
    assert reason(d_up=c.d_up.half()) == "d_up is not contiguous float32"
    assert reason(d_down=c.d_down[:, ::2]) == "d_down is not contiguous float32"
    assert reason(up=c.up[:4]) == "a tail of 4 elements is no multiple of 8"
    assert reason(up=c.up.half()) == "u is bfloat16, and up float16"


def test_the_limit_is_that_of_the_header() -> None:
    header = (SOURCES / "geglu_lora.h").read_text()
    assert f"kGegluLoraRanks = {MOST_RANKS};" in header
    assert f"kGegluLoraRows = 1LL << {MOST_ROWS.bit_length() - 1};" in header


# ------------------------------------------------------------------------------------- the kernel

gpu = pytest.mark.gpu
CASES = [  # tokens, width, ranks of A and of B
    *((4096, 5120, 16, 16), (16384, 2560, 16, 16), (1024, 5120, 16, 16), (16384, 1280, 16, 16)),
    *((256, 5120, 8, 16), (1, 8, 1, 1), (7, 8, 16, 4), (9, 72, 13, 8), (77, 328, 4, 16)),
    *((1031, 200, 8, 8), (640, 1288, 16, 1), (33, 64, 16, 16), (4097, 136, 3, 9)),
]


def loaded() -> None:
    """Builds and loads the kernels and refuses anything else."""
    set_backend("cuda")
    geglu_backward(torch.ones(1, 8, device="cuda"), torch.ones(1, 16, device="cuda"))


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_the_kernel_is_no_less_exact_than_eager(
    sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    loaded()
    c = case(*sizes, dtype)
    true = c.to(torch.float64).run(geglu_backward_lora_reference)
    eager = c.run(geglu_backward_lora_reference)
    with poison():
        found = c.run()
    du, p, *_ = found
    assert torch.equal(du[:, : 2 * sizes[1]], geglu_backward(c.da, c.u)[0])
    assert torch.equal(du[:, 2 * sizes[1] :], p)
    kinds = dtype, dtype, torch.float32, torch.float32
    for one, of_eager, exact, kind in zip(found, eager, true, kinds, strict=True):
        assert error(one, exact) <= 2 * error(of_eager, exact) + ulp(exact, kind)


@gpu
def test_the_kernel_gives_the_same_bits_twice_and_in_a_graph() -> None:
    loaded()
    c = case(1025, 2560, 16, 16, torch.bfloat16)
    zero = replace(c, d_down=torch.zeros_like(c.d_down), d_up=torch.zeros_like(c.d_up))
    first, again = zero.run(), zero.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = zero.run()
    graph.replay()
    for one, other, in_graph in zip(first, again, captured, strict=True):
        assert torch.equal(one, other) and torch.equal(one, in_graph)


@gpu
def test_rows_that_lie_otherwise() -> None:
    loaded()
    c = case(45, 64, 16, 8, torch.bfloat16)
    expected = c.run()
    shifted = torch.empty(c.da.numel() + 1, device="cuda", dtype=c.da.dtype)[1:].view(c.da.shape)
    other = replace(c, da=shifted.copy_(c.da), u=c.u.T.contiguous().T)
    assert all(map(torch.equal, other.run(), expected))


@gpu
@pytest.mark.parametrize(("ranks", "dtype"), [(24, torch.bfloat16), (8, torch.float32)])
def test_what_the_kernel_cannot_do_others_do(ranks: int, dtype: torch.dtype) -> None:
    loaded()  # which refuses PyTorch's own operations
    c = case(77, 64, ranks, ranks, dtype)
    truth = c.to(torch.float64).run(geglu_backward_lora_reference)
    for one, exact in zip(c.run(), truth, strict=True):
        assert error(one, exact) <= 8 * ulp(exact, dtype)


@gpu
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda c: replace(c, da=c.da.half()), "da is of type Half"),
        (lambda c: replace(c, u=c.u[:3]), "da has 64 elements, expected 3 rows of 16"),
        (lambda c: replace(c, p=c.p[:, :4]), "p has 4 columns"),
        (lambda c: replace(c, h=c.h[:2]), "h has 16 elements, expected 4 rows of 8"),
        (lambda c: replace(c, d_down=c.d_down[:, :8]), "d_down is not .8, 16."),
        (lambda c: replace(c, d_up=c.d_up[:8]), "d_up is not .32, 8."),
        (lambda c: replace(c, d_up=torch.zeros(32, 9, device="cuda")), "p and h have 8 and 8"),
        (lambda c: replace(c, up=c.up[:, :16]), "up has 128 elements, expected 8 rows of 32"),
    ],
)
def test_the_kernel_names_what_it_cannot_take(wrong: Callable[[Case], Case], message: str) -> None:
    loaded()
    c = wrong(case(4, 16, 8, 8, torch.bfloat16))
    with pytest.raises(RuntimeError, match=f"geglu_backward_lora: {message}"):
        torch.ops.eri.geglu_backward_lora(*given(c))


@gpu
def test_bandwidth() -> None:
    loaded()
    copied = copy_bandwidth()
    print(f"\na copy moves {copied / 1e12:.2f} TB/s")
    for rows, width in ((1024, 5120), (4096, 5120), (16384, 2560), (16384, 1280)):
        cases = [case(rows, width, 16, 16, torch.bfloat16) for _ in range(3)]

        def apart(i: int, cases: list[Case] = cases) -> None:
            c = cases[i]
            du, a = geglu_backward(c.da, c.u)
            none = torch.zeros(1, 0, 16, device="cuda"), torch.zeros(16, 0, device="cuda")
            lora_gradients([Gradient(a[:, :0], a, c.p, c.p, c.d_down, none[0])])
            lora_gradients([Gradient(du, du[:, :0], c.h, c.h, none[1], c.d_up[None])])
            lora_down(du, c.up, 1, SCALE)

        together = microseconds(
            lambda i, c=cases: torch.ops.eri.geglu_backward_lora(*given(c[i])), 3
        )
        alone, reached = microseconds(apart, 3), 10 * rows * width / together * 1e6
        print(
            f"{rows:6d} x {width}: {together:7.1f} us, {reached / copied:.0%} of a copy, "
            f"one after the other {alone:7.1f} us"
        )
        if width >= 2560 and rows >= 4096:  # as SDXL has them
            assert together < alone

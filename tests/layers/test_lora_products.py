from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from eri.errors import ConfigError
from eri.layers.backend import set_backend
from eri.layers.build import SOURCES
from eri.layers.lora_products import (
    MOST_GRADIENTS,
    MOST_RANKS,
    Gradient,
    lora_down,
    lora_down_reference,
    lora_gradient,
    lora_gradient_reference,
    lora_gradients,
    unsupported,
)
from tests.kernel_checks import copy_bandwidth, error, microseconds, ulp

TYPES = [torch.float32, torch.float16, torch.bfloat16]


def spread(matrix: Tensor, gap: int = 16) -> Tensor:
    """The matrix with NaN around it and between its rows."""
    rows, width = matrix.shape
    around = matrix.new_full((rows + 2, width + gap), torch.nan)
    return around[1:-1, gap // 2 : gap // 2 + width].copy_(matrix)


def with_tail(wide: Tensor, ranks: int) -> Tensor:
    """Rows that have room behind them, which holds NaN, as does what lies around."""
    tail = wide.new_full((len(wide), ranks), torch.nan)
    return spread(torch.cat([wide, tail], dim=1))


def padded(rank: int) -> int:
    return (rank + 7) // 8 * 8


@dataclass
class Case:
    """n layers; each of the tensors is what `lora_gradient` takes."""

    dy: Tensor
    x: Tensor
    p: Tensor
    h: Tensor
    d_down: Tensor
    d_up: Tensor

    def to(self, dtype: torch.dtype) -> "Case":
        """The same numbers in another type, sums included."""
        dy, x, p, h, d_down, d_up = (
            t.to(dtype) for t in (self.dy, self.x, self.p, self.h, self.d_down, self.d_up)
        )
        return Case(dy, x, p, h, d_down, d_up)

    def run(self, work: Callable[..., None]) -> tuple[Tensor, Tensor]:
        d_down, d_up = self.d_down.clone(), self.d_up.clone()
        work(self.dy, self.x, self.p, self.h, d_down, d_up)
        return d_down, d_up


def case(
    tokens: int,
    outputs: int,
    inputs: int,
    rank: int,
    layers: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cuda",
) -> Case:
    """Gradients are there already; where a rank is padded, p and h hold NaN."""

    def matrix(width: int) -> Tensor:
        return spread(torch.randn(tokens, width, device=device).to(dtype))

    def small() -> Tensor:
        found = matrix(layers * padded(rank))
        found.unflatten(1, (layers, -1))[:, :, rank:] = torch.nan
        return found

    d_down = torch.randn(layers * rank, inputs, device=device)
    d_up = torch.randn(layers, outputs, rank, device=device)
    return Case(matrix(layers * outputs), matrix(inputs), small(), small(), d_down, d_up)


# ----------------------------------------------------------------------------------- what they are


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_each_group_has_a_product_and_the_tail_a_copy(groups: int) -> None:
    wide = torch.randn(5, groups * 6, dtype=torch.float64)
    down = torch.randn(groups * 8, 6, dtype=torch.float64)
    rows = with_tail(wide, len(down))
    around = rows._base
    assert around is not None
    empty = around.isnan().sum()
    h = lora_down(rows, down, groups, 0.7)
    expected = [
        0.7 * part @ matrix.T
        for part, matrix in zip(wide.chunk(groups, 1), down.chunk(groups), strict=True)
    ]
    torch.testing.assert_close(h, torch.cat(expected, dim=1))
    assert torch.equal(rows, torch.cat([wide, h], dim=1))
    assert around.isnan().sum() == empty - h.numel()


@pytest.mark.parametrize(("layers", "rank"), [(1, 8), (1, 3), (3, 8), (3, 3)])
def test_the_gradients_are_autograds(layers: int, rank: int) -> None:
    c = case(11, 6, 10, rank, layers, device="cpu").to(torch.float64)
    a = torch.randn(layers, rank, 10, dtype=torch.float64, requires_grad=True)
    b = torch.randn(layers, 6, rank, dtype=torch.float64, requires_grad=True)
    h, scale = torch.einsum("tk,lrk->tlr", c.x, a), 0.7
    y = scale * torch.einsum("tlr,lnr->tln", h, b).flatten(1)
    d_a, d_b = torch.autograd.grad(y, (a, b), c.dy)
    p = scale * torch.einsum("tln,lnr->tlr", c.dy.unflatten(1, (layers, -1)), b)
    c.p.unflatten(1, (layers, -1))[..., :rank] = p.detach()
    c.h.unflatten(1, (layers, -1))[..., :rank] = scale * h.detach()
    found = c.run(lora_gradient)
    torch.testing.assert_close(found[0], c.d_down + d_a.flatten(0, 1))
    torch.testing.assert_close(found[1], c.d_up + d_b)


def test_the_ops_are_registered_as_pytorch_wants_them(device: torch.device) -> None:
    if device.type == "cuda":
        loaded()
    rows, down = torch.randn(5, 2 * 24 + 16, device=device), torch.randn(16, 24, device=device)
    torch.library.opcheck(torch.ops.eri.lora_down.default, (rows, down, 2, 0.7))
    c = case(5, 16, 24, 8, 2, device=device)
    given = (c.dy, c.x, c.p, c.h, c.d_down, c.d_up)
    torch.library.opcheck(torch.ops.eri.lora_gradient.default, given)
    lists = [[tensor, tensor.clone()] for tensor in given]
    torch.library.opcheck(torch.ops.eri.lora_gradients.default, lists)


def test_several_gradients_are_one_after_the_other() -> None:
    cases = [case(11, 6, 8 + i, 3, 1 + i % 2, device="cpu") for i in range(6)]
    expected = [c.run(lora_gradient) for c in cases]
    totals = [(c.d_down.clone(), c.d_up.clone()) for c in cases]
    pieces = [Gradient(c.dy, c.x, c.p, c.h, *t) for c, t in zip(cases, totals, strict=True)]
    lora_gradients(pieces)
    for found, each in zip(totals, expected, strict=True):
        assert all(map(torch.equal, found, each))
    lora_gradients([])


def test_reasons_are_in_words() -> None:
    def reason(rows: Tensor, ranks: int = 8, **totals: Tensor) -> str | None:
        return unsupported(ranks, totals, rows=rows, down=torch.zeros(16, 16).to(rows.dtype))

    assert reason(torch.zeros(3, 24)) is None
    assert reason(torch.zeros(3, 24)[:1]) is None
    assert reason(torch.zeros(3, 24).double()) == (
        "rows is float64, not float32, float16 or bfloat16"
    )
    rows = "rows has rows of {} elements every {}, not multiples of {}"
    assert reason(torch.zeros(3, 26)) == rows.format(26, 26, 4)
    assert reason(torch.zeros(3, 30)[:, :24]) == rows.format(24, 30, 4)
    assert reason(torch.zeros(3, 12).half()) == rows.format(12, 12, 8)
    assert reason(torch.zeros(24, 4).T) == rows.format(24, 1, 4)
    assert reason(torch.zeros(3, 28)[:, 2:26]) == "rows does not begin at a multiple of 16 bytes"
    assert reason(torch.zeros(1, 8).expand(2**30, 8)) == (
        "rows is [1073741824, 8], not less than 1073741824 rows and columns"
    )
    found = unsupported(8, {}, x=torch.zeros(3, 8).half(), down=torch.zeros(8, 8))
    assert found == "x is float16, and down float32"
    assert reason(torch.zeros(3, 24), 4) == (
        "layers have 4 ranks each and 16 in all, not a multiple of 8 and at most 4096"
    )
    assert reason(torch.zeros(3, 24), d_up=torch.zeros(2, 8, 4).half()) == (
        "d_up is not contiguous float32"
    )
    assert reason(torch.zeros(3, 24), d_up=torch.zeros(2, 6, 4)) == (
        "layers have 6 outputs, not a multiple of 4"
    )


def test_the_limit_is_that_of_the_header() -> None:
    assert f"kLoraMostRanks = {MOST_RANKS};" in (SOURCES / "lora_products.h").read_text()
    assert f"kLoraGradients = {MOST_GRADIENTS};" in (SOURCES / "lora_products.h").read_text()


def test_the_backend_cuda_refuses_other_devices() -> None:
    set_backend("cuda")
    with pytest.raises(ConfigError, match="this is cpu"):
        lora_down(torch.zeros(2, 24), torch.zeros(8, 16), 1, 1.0)


# ------------------------------------------------------------------------------------- the kernels

gpu = pytest.mark.gpu
DOWN = [  # tokens, width, ranks of a group, groups
    *((4096, 1280, 16, 1), (4096, 1280, 48, 1), (4096, 1280, 16, 3), (1024, 10240, 16, 1)),
    *((16384, 640, 16, 1), (16384, 640, 48, 1), (64, 1280, 16, 1), (308, 2048, 32, 1)),
    *((16384, 320, 8, 3), (1024, 5120, 64, 1), (231, 2560, 128, 2), (1000, 104, 200, 3)),
    *((77, 648, 16, 2), (1, 8, 8, 1), (13, 40, 24, 1), (12289, 72, 56, 1)),
    *((4096, 320, 32, 1), (700, 640, 16, 3), (2048, 640, 24, 2)),
]
GRADIENT = [  # tokens, outputs, inputs, rank, layers
    *((4096, 1280, 1280, 16, 1), (4096, 1280, 1280, 16, 3), (1024, 10240, 1280, 16, 1)),
    *((16384, 640, 640, 16, 3), (16384, 640, 2560, 16, 1), (1024, 1280, 5120, 8, 1)),
    *((308, 1280, 2048, 16, 2), (64, 1280, 1280, 4, 1), (231, 320, 1288, 1, 3)),
    *((1000, 104, 200, 13, 2), (77, 328, 648, 64, 1), (1024, 640, 640, 128, 3), (1, 8, 8, 1, 1)),
    *((15, 72, 8, 40, 1), (2049, 320, 320, 24, 3)),
]


def loaded() -> None:
    """Builds and loads the kernels and refuses anything else."""
    set_backend("cuda")
    lora_down(torch.ones(1, 24, device="cuda"), torch.ones(8, 16, device="cuda"), 1, 1.0)


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width", "ranks", "groups"), DOWN)
def test_down_is_no_less_exact_than_eager(
    tokens: int, width: int, ranks: int, groups: int, dtype: torch.dtype
) -> None:
    set_backend("cuda")
    wide = torch.randn(tokens, groups * width, device="cuda").to(dtype)
    down = torch.randn(groups * ranks, width, device="cuda").to(dtype) / width**0.5
    rows, others = with_tail(wide, len(down)), with_tail(wide, len(down))
    around = rows._base
    assert around is not None
    empty = around.isnan().sum()
    h = lora_down(rows, down, groups, 0.7)
    truth = lora_down_reference(wide.double(), down.double(), groups, 0.7)
    eager = lora_down_reference(others, down, groups, 0.7)
    assert h.dtype == dtype and h.shape == truth.shape
    assert error(h, truth) <= 2 * error(eager, truth) + ulp(truth, dtype)
    assert torch.equal(rows, torch.cat([wide, h], dim=1))
    assert around.isnan().sum() == empty - h.numel()


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("tokens", "outputs", "inputs", "rank", "layers"), GRADIENT)
def test_gradients_are_no_less_exact_than_eager(
    tokens: int, outputs: int, inputs: int, rank: int, layers: int, dtype: torch.dtype
) -> None:
    set_backend("cuda")
    c = case(tokens, outputs, inputs, rank, layers, dtype)
    truths = c.to(torch.float64).run(lora_gradient_reference)
    eagers = c.run(lora_gradient_reference)
    for found, eager, truth in zip(c.run(lora_gradient), eagers, truths, strict=True):
        assert found.dtype == torch.float32
        assert error(found, truth) <= 2 * error(eager, truth) + ulp(truth, torch.float32)


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("ranks", [(16, 16, 16, 16), (4, 3, 24, 8), (1, 64)], ids=str)
@pytest.mark.parametrize("tokens", [77, 1024])
def test_several_gradients_in_a_launch_are_no_less_exact(
    tokens: int, ranks: tuple[int, ...], dtype: torch.dtype
) -> None:
    set_backend("cuda")
    shapes = [(640, 320, 1), (128, 1280, 3), (72, 64, 2), (2560, 320, 1)]
    cases = [
        case(tokens + i, outputs, inputs, rank, layers, dtype)
        for i, (rank, (outputs, inputs, layers)) in enumerate(zip(ranks, shapes, strict=False))
    ]
    totals = [(c.d_down.clone(), c.d_up.clone()) for c in cases]
    lora_gradients([Gradient(c.dy, c.x, c.p, c.h, *t) for c, t in zip(cases, totals, strict=True)])
    for c, both in zip(cases, totals, strict=True):
        truths = c.to(torch.float64).run(lora_gradient_reference)
        eagers = c.run(lora_gradient_reference)
        for found, eager, truth in zip(both, eagers, truths, strict=True):
            assert error(found, truth) <= 2 * error(eager, truth) + ulp(truth, torch.float32)


@gpu
def test_several_gradients_must_be_few_and_alike() -> None:
    loaded()
    c = case(8, 16, 16, 8, dtype=torch.bfloat16)
    given = [c.dy, c.x, c.p, c.h, c.d_down, c.d_up]
    with pytest.raises(RuntimeError, match="lora_gradients: 5 of dy, expected 1 to 4"):
        torch.ops.eri.lora_gradients(*([one] * 5 for one in given))
    with pytest.raises(RuntimeError, match="lora_gradients: x is of type"):
        torch.ops.eri.lora_gradients(*([one] for one in [c.dy, c.x.float(), *given[2:]]))


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rows_of_no_tokens_change_nothing(dtype: torch.dtype) -> None:
    set_backend("cuda")
    c = case(0, 16, 24, 8, 2, dtype)
    assert torch.equal(c.run(lora_gradient)[0], c.d_down)
    assert torch.equal(c.run(lora_gradient)[1], c.d_up)
    rows, down = torch.zeros(0, 24, device="cuda", dtype=dtype), torch.zeros(8, 16, device="cuda")
    assert lora_down(rows, down.to(dtype), 1, 1.0).shape == (0, 8)


@gpu
def test_what_is_not_finite_stays_with_its_token_and_rank() -> None:
    set_backend("cuda")
    rows = torch.randn(40, 144, device="cuda", dtype=torch.bfloat16)
    rows[3, 100] = torch.inf
    down = torch.randn(16, 128, device="cuda", dtype=torch.bfloat16)
    h = lora_down(rows, down, 1, 1.0)
    assert not h[3].isfinite().any() and h[:3].isfinite().all() and h[4:].isfinite().all()
    c = case(40, 64, 64, 16, dtype=torch.bfloat16)
    c.p[7, 5], c.dy[9, 33] = torch.nan, torch.nan
    d_down, d_up = c.run(lora_gradient)
    bad = torch.zeros_like(d_down, dtype=torch.bool)
    bad[5] = True
    assert torch.equal(d_down.isnan(), bad)
    bad = torch.zeros_like(d_up, dtype=torch.bool)
    bad[:, 33] = True
    assert torch.equal(d_up.isnan(), bad)


@gpu
@pytest.mark.parametrize(("tokens", "layers"), [(1024, 1), (4096, 3), (16384, 1), (77, 2)])
def test_the_kernels_give_the_same_bits_each_time_and_in_a_graph(tokens: int, layers: int) -> None:
    set_backend("cuda")
    c = case(tokens, 640, 1280, 16, layers, torch.bfloat16)
    down = torch.randn(layers * 16, 640, device="cuda", dtype=torch.bfloat16)
    rows = with_tail(c.dy, len(down))

    def both(d_down: Tensor, d_up: Tensor) -> Tensor:
        h = lora_down(rows, down, layers, 1.0)
        lora_gradient(c.dy, c.x, c.p, c.h, d_down, d_up)
        return h

    def fresh() -> list[Tensor]:
        totals = [c.d_down.clone(), c.d_up.clone()]
        return [*totals, both(*totals), rows.clone()]

    first = fresh()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, fresh(), strict=True))
    totals = [c.d_down.clone(), c.d_up.clone()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h = both(*totals)
    for _ in range(3):
        totals[0].copy_(c.d_down)
        totals[1].copy_(c.d_up)
        rows[:, -len(down) :] = torch.nan
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(first, [*totals, h, rows], strict=True))


@gpu
def test_what_the_kernels_cannot_do_the_reference_does() -> None:
    said: list[str] = []
    set_backend("auto", said.append)
    wide = torch.randn(3, 10, device="cuda", dtype=torch.float64)
    down = torch.randn(8, 10, device="cuda", dtype=torch.float64)
    torch.testing.assert_close(lora_down(with_tail(wide, 8), down, 1, 1.0), wide @ down.T)
    assert any("lora_down: PyTorch's own operations" in line for line in said)


@gpu
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("dy", lambda c: c.dy[:, :8]),
        ("x", lambda c: c.x.float()),
        ("x", lambda c: c.x[:, 4:28]),
        ("p", lambda c: c.p.t().contiguous().t()),
        ("h", lambda c: c.h.cpu()),
        ("h", lambda c: c.h[:, :8]),
        ("d_down", lambda c: c.d_down.half()),
        ("d_down", lambda c: c.d_down[1:]),
        ("d_up", lambda c: c.d_up.transpose(0, 1)),
        ("dy, x, p and h", lambda c: c.x),
    ],
)
def test_the_kernel_names_what_it_cannot_take(name: str, wrong: Callable[[Case], Tensor]) -> None:
    loaded()
    c = case(9, 16, 32, 8, 2, torch.bfloat16)
    given = {key: getattr(c, key) for key in ("dy", "x", "p", "h", "d_down", "d_up")}
    if name in given:
        given[name] = wrong(c)
    else:
        given["x"] = given["x"][:-1]
    with pytest.raises(RuntimeError, match=rf"lora_gradient: {name}"):
        torch.ops.eri.lora_gradient(*given.values())


@gpu
@pytest.mark.parametrize(
    ("message", "width", "down"),
    [
        ("rows has 32 columns", 32, (8, 16)),
        ("rows has rows of 28", 28, (8, 24)),
        ("a group has 4 ranks", 40, (8, 16)),
        ("down has 9 rows", 48, (9, 16)),
    ],
)
def test_down_names_what_it_cannot_take(message: str, width: int, down: tuple[int, int]) -> None:
    loaded()
    rows = torch.zeros(3, (width + 7) // 8 * 8, device="cuda", dtype=torch.half)[:, :width]
    rows = rows if width % 8 else rows.contiguous()
    groups = 1 if down[0] == 8 and width != 40 else 2
    with pytest.raises(RuntimeError, match=f"lora_down: {message}"):
        torch.ops.eri.lora_down(
            rows, torch.zeros(down, device="cuda", dtype=torch.half), groups, 1.0
        )


# --------------------------------------------------------------------------------------- the speed


def bf16(*sizes: int) -> Tensor:
    return torch.randn(*sizes, device="cuda").bfloat16()


def eager_down(rows: Tensor, down: Tensor, groups: int) -> None:
    """What `lora_down` takes the place of, without the compact copy: one product into the tail."""
    width = rows.shape[1] - len(down)
    wide, tail = rows[:, :width], rows[:, width:]
    if groups == 1:
        torch.mm(wide, down.T, out=tail)
        return
    split, out = (part.unflatten(1, (groups, -1)).transpose(0, 1) for part in (wide, tail))
    torch.bmm(split, down.unflatten(0, (groups, -1)).mT, out=out)


def eager_gradient(c: Case) -> None:
    """What `lora_gradient` takes the place of: a product for A, one for B, summed in float32."""
    aten, layers, single = torch.ops.aten, len(c.d_up), torch.float32
    aten.addmm.dtype_out(c.d_down, c.p.T, c.x, single, out=c.d_down)
    if layers == 1:
        aten.addmm.dtype_out(c.d_up[0], c.dy.T, c.h, single, out=c.d_up[0])
        return
    dys, hs = (t.unflatten(1, (layers, -1)).transpose(0, 1) for t in (c.dy, c.h))
    aten.baddbmm.dtype_out(c.d_up, dys.mT, hs, single, out=c.d_up)


@gpu
def test_bandwidth_down() -> None:
    set_backend("cuda")
    copied = copy_bandwidth()
    print(f"\na copy moves {copied / 1e12:.2f} TB/s")
    for tokens, width, ranks, groups in (
        *((1024, 1280, 16, 1), (1024, 1280, 48, 1), (1024, 1280, 16, 3), (1024, 10240, 16, 1)),
        *((4096, 640, 16, 1), (4096, 1280, 16, 1), (4096, 1280, 48, 1), (4096, 1280, 16, 3)),
        *((4096, 5120, 16, 1), (4096, 10240, 16, 1), (16384, 640, 16, 1), (16384, 640, 48, 1)),
        *((16384, 640, 16, 3), (16384, 2560, 16, 1), (16384, 5120, 16, 1)),
    ):
        sets = [bf16(tokens, groups * (width + ranks)) for _ in range(4)]
        down = bf16(groups * ranks, width)
        ours = microseconds(lambda i, s=sets, d=down, g=groups: lora_down(s[i], d, g, 1.0))
        others = microseconds(lambda i, s=sets, d=down, g=groups: eager_down(s[i], d, g))
        reached = 2 * tokens * groups * width / ours * 1e6
        print(
            f"{tokens:6d} x {groups} x {width:5d}, {ranks} ranks: {ours:6.1f} us, "
            f"{reached / 1e12:.2f} TB/s, {reached / copied:4.0%}, eager {others:6.1f} us"
        )
        if tokens * groups * width >= 2**26:
            assert reached > 0.6 * copied


@gpu
def test_bandwidth_gradient() -> None:
    set_backend("cuda")
    copied = copy_bandwidth()
    print(f"\na copy moves {copied / 1e12:.2f} TB/s")
    for tokens, outputs, inputs, rank, layers in (
        *((1024, 1280, 1280, 16, 1), (1024, 1280, 1280, 16, 3), (1024, 10240, 1280, 16, 1)),
        *((1024, 1280, 5120, 16, 1), (308, 1280, 2048, 16, 2), (4096, 640, 640, 16, 1)),
        *((4096, 640, 640, 16, 3), (4096, 1280, 1280, 16, 1), (4096, 1280, 1280, 16, 3)),
        *((4096, 10240, 1280, 16, 1), (4096, 1280, 5120, 16, 1), (16384, 640, 640, 16, 1)),
        *((16384, 640, 640, 16, 3), (16384, 5120, 640, 16, 1), (16384, 640, 2560, 16, 1)),
        *((4096, 1280, 1280, 64, 1), (4096, 1280, 1280, 64, 3)),
    ):
        sets = [
            Case(
                *(bf16(tokens, layers * outputs), bf16(tokens, inputs)),
                *(bf16(tokens, layers * rank), bf16(tokens, layers * rank)),
                torch.zeros(layers * rank, inputs, device="cuda"),
                torch.zeros(layers, outputs, rank, device="cuda"),
            )
            for _ in range(4)
        ]

        def kernel(i: int, s: list[Case] = sets) -> None:
            c = s[i]
            lora_gradient(c.dy, c.x, c.p, c.h, c.d_down, c.d_up)

        ours, others = microseconds(kernel), microseconds(lambda i, s=sets: eager_gradient(s[i]))
        reached = 2 * tokens * (layers * outputs + inputs) / ours * 1e6
        print(
            f"{tokens:6d} x {layers} x {outputs:5d}, {inputs:5d}, rank {rank}: {ours:6.1f} us, "
            f"{reached / 1e12:.2f} TB/s, {reached / copied:4.0%}, eager {others:6.1f} us"
        )
        if tokens * (layers * outputs + inputs) >= 2**26 and rank == 16:
            assert reached > 0.4 * copied
    for tokens, width in ((4096, 1280), (1024, 1280), (16384, 640)):
        square = (width, width, 1)
        for name, shapes in (
            ("feed-forward", [(8 * width, width, 1), (width, 4 * width, 1)]),
            ("attentions", [(width, width, 3), square, square, square]),
        ):
            groups = [
                [case(tokens, n, k, 16, layers, torch.bfloat16) for n, k, layers in shapes]
                for _ in range(3)
            ]
            us = microseconds(
                lambda i, g=groups: lora_gradients(
                    [Gradient(c.dy, c.x, c.p, c.h, c.d_down, c.d_up) for c in g[i]]
                ),
                sets=3,
            )
            size = sum(2 * tokens * (layers * n + k) for n, k, layers in shapes)
            print(f"{tokens} x {width}, {name}: {us:.1f} us, {size / us / 1e6:.2f} TB/s")

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from eri.errors import ConfigError
from eri.layers import MulRows, RMSNorm
from eri.layers.backend import set_backend
from eri.layers.build import SOURCES
from eri.layers.scale_rows import (
    MOST_VECTORS,
    mul_rows,
    rms_norm,
    scale_rows_backward_reference,
    scale_rows_reference,
    unsupported,
)
from tests.kernel_checks import (
    copy_bandwidth,
    error,
    gradients,
    microseconds,
    ops_on_cpu,
    ulp,
    where_ops_are,
    with_gaps,
)

TYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5
KINDS = [(True, EPS), (False, EPS), (True, None)]  # a weight, eps: RMSNorm, the same, MulRows
every_kind = pytest.mark.parametrize(("weighted", "eps"), KINDS)
Layer = Callable[[Tensor, Tensor | None], Tensor]


def layer(eps: float | None) -> Layer:
    """The public function."""
    if eps is None:
        return lambda x, weight: mul_rows(x, weight if weight is not None else torch.ones_like(x))
    return lambda x, weight: rms_norm(x, weight, eps)


def weight_of(weighted: bool, width: int, **options: Any) -> Tensor | None:
    return (1 + 0.3 * torch.randn(width, **options)).requires_grad_() if weighted else None


def leaf(numbers: Tensor) -> Tensor:
    return numbers.detach().requires_grad_()


@every_kind
def test_the_backward_formula_is_autograds(weighted: bool, eps: float | None) -> None:
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = weight_of(weighted, 6, dtype=torch.float64)
    dy = torch.randn_like(x)
    expected = gradients(scale_rows_reference(x, weight, eps), dy, x, weight)
    dx, dw = scale_rows_backward_reference(dy, x.detach(), weight, eps)
    torch.testing.assert_close([dx, dw][: len(expected) - 1], expected[1:])


@every_kind
def test_the_op_has_the_right_gradients_of_both_orders(weighted: bool, eps: float | None) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = weight_of(weighted, 4, dtype=torch.float64)
    given = (x,) if weight is None else (x, weight)

    def call(x: Tensor, weight: Tensor | None = None) -> Tensor:
        return torch.ops.eri.scale_rows(x, weight, eps)

    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)


@every_kind
def test_where_there_are_kernels_the_layers_take_the_op(weighted: bool, eps: float | None) -> None:
    module: nn.Module = MulRows(8)
    if eps is not None:
        module = RMSNorm(8, eps) if weighted else RMSNorm(elementwise_affine=False)
    leaves = [torch.randn(2, 3, 8, requires_grad=True), *module.parameters()]
    dy = torch.randn(2, 3, 8)
    expected = gradients(module(leaves[0]), dy, *leaves)
    with ops_on_cpu():
        y = module(leaves[0])
        assert y.grad_fn is not None and "scale_rows" in y.grad_fn.name()
        torch.testing.assert_close(gradients(y, dy, *leaves), expected)


def test_a_program_of_the_compiler_has_no_op() -> None:
    module, x = RMSNorm(8), torch.randn(3, 8)
    names: list[str] = []

    def note(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compiler.reset()
    with ops_on_cpu():
        found = torch.compile(module, fullgraph=True, backend=note)(x)
    torch.testing.assert_close(found, module(x))
    assert any("rms_norm" in name for name in names)
    assert not any("scale_rows" in name for name in names)


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8)
    wanted: list[bool] = []

    class Notes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.eri.scale_rows_backward.default:
                wanted.append(args[-1])
            return func(*args, **(kwargs or {}))

    with ops_on_cpu(), Notes():
        mul_rows(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is None and wanted == [False]
    assert torch.ops.eri.scale_rows_backward(x, x, weight, None, False)[1].numel() == 0


@every_kind
def test_a_gradient_can_be_differentiated_again(
    weighted: bool, eps: float | None, device: torch.device
) -> None:
    x = torch.randn(5, 16, device=device, requires_grad=True)
    weight = weight_of(weighted, 16, device=device)

    def twice(y: Tensor) -> list[Tensor]:
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return [*torch.autograd.grad(dx.square().sum(), [x] if weight is None else [x, weight])]

    expected = twice(scale_rows_reference(x, weight, eps))
    with where_ops_are(device):
        torch.testing.assert_close(twice(layer(eps)(x, weight)), expected)


@every_kind
@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 32), (16,)])
def test_the_ops_are_registered_as_pytorch_wants_them(
    shape: tuple[int, ...], weighted: bool, eps: float | None, device: torch.device
) -> None:
    if device.type == "cuda":
        loaded()
    x = torch.randn(shape, device=device, requires_grad=True)
    weight = weight_of(weighted, shape[-1], device=device)
    frozen = None if weight is None else weight.detach()
    dy = torch.randn(shape, device=device)
    torch.library.opcheck(torch.ops.eri.scale_rows.default, (x, weight, eps))
    torch.library.opcheck(torch.ops.eri.scale_rows.default, (x.detach(), frozen, eps))
    for of_weight in (True, False):
        given = (dy, x.detach(), frozen, eps, of_weight)
        torch.library.opcheck(torch.ops.eri.scale_rows_backward.default, given)


def test_the_ops_give_contiguous_results() -> None:
    x = torch.randn(6, 4).t()
    torch.library.opcheck(torch.ops.eri.scale_rows.default, (x, None, EPS))
    torch.library.opcheck(torch.ops.eri.scale_rows_backward.default, (x, x, None, EPS, True))


def test_reasons_are_in_words() -> None:
    def reason(width: int, dtype: torch.dtype, of_weight: torch.dtype | None = None) -> str | None:
        weight = torch.ones(width, dtype=of_weight or dtype)
        return unsupported(torch.zeros(2, width, dtype=dtype), weight)

    assert reason(4096, torch.float32) is None
    assert reason(8192, torch.bfloat16) is None
    assert unsupported(torch.zeros(2, 8), None) is None
    rows = "x has rows of {} elements, not a multiple of {} up to {}"
    assert reason(4100, torch.float32) == rows.format(4100, 4, 4096)
    assert reason(12, torch.float16) == rows.format(12, 8, 8192)
    assert reason(0, torch.float16) == rows.format(0, 8, 8192)
    assert reason(8, torch.float64) == "x is float64, not float32, float16 or bfloat16"
    found = reason(8, torch.bfloat16, torch.float32)
    assert found == "x is bfloat16, and its weight float32"
    assert unsupported(torch.zeros(0, 8), None) == "x has 0 rows, not 1 to 2147483647"


def test_the_limit_is_that_of_the_header() -> None:
    assert f"kScaleRowsVectors = {MOST_VECTORS};" in (SOURCES / "scale_rows.h").read_text()


def test_the_backend_cuda_refuses_other_devices_and_what_the_kernels_cannot_do() -> None:
    set_backend("cuda")
    with pytest.raises(ConfigError, match="this is cpu"):
        RMSNorm(8)(torch.zeros(2, 8))
    with ops_on_cpu():
        with pytest.raises(ConfigError, match="rms_norm: x has rows of 6 elements"):
            RMSNorm(6)(torch.zeros(2, 6))
        with pytest.raises(ConfigError, match="mul_rows: x has 0 rows"):
            MulRows(8)(torch.zeros(0, 8))


def test_autocast_keeps_its_type_of_a_norm() -> None:
    with ops_on_cpu(), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ConfigError, match="rms_norm: autocast computes it in float32"):
            RMSNorm(elementwise_affine=False)(torch.zeros(2, 8, dtype=torch.bfloat16))
        assert RMSNorm(8)(torch.ones(2, 8)).dtype == torch.float32


# ------------------------------------------------------------------------------------- the kernels

gpu = pytest.mark.gpu
SHAPES = [
    *((1024, 1280), (3, 77, 320), (7, 8), (1, 1032), (513, 2560), (5, 256)),
    *((4097, 640), (2, 3, 4096), (33, 8192), (600, 3080), (16,)),
]


def loaded() -> None:
    """Builds and loads the kernels and refuses anything else."""
    set_backend("cuda")
    rms_norm(torch.ones(1, 16, device="cuda"), None, EPS)


def fitting(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """The shape, or a narrower one that the kernels take."""
    return (*shape[:-1], min(shape[-1], 4096)) if dtype == torch.float32 else shape


@gpu
@every_kind
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_are_no_less_exact_than_eager(
    shape: tuple[int, ...], dtype: torch.dtype, offset: float, weighted: bool, eps: float | None
) -> None:
    set_backend("cuda")
    shape = fitting(shape, dtype)
    x = leaf((3 * torch.randn(shape, device="cuda") + offset).to(dtype))
    weight = weight_of(weighted, shape[-1], device="cuda")
    weight = None if weight is None else leaf(weight.to(dtype))
    dy = torch.randn(shape, device="cuda").to(dtype)
    true_x, true_weight = leaf(x.double()), None if weight is None else leaf(weight.double())
    true = scale_rows_reference(true_x, true_weight, eps)
    truth = gradients(true, dy.double(), true_x, true_weight)
    eager = gradients(scale_rows_reference(x, weight, eps), dy, x, weight)
    found = gradients(layer(eps)(x, weight), dy, x, weight)
    assert len(found) == 2 + weighted
    for one, other, exact in zip(found, eager, truth, strict=True):
        assert one.dtype == dtype and one.shape == exact.shape and one.is_contiguous()
        assert error(one, exact) <= 2 * error(other, exact) + ulp(exact, dtype)


@gpu
@every_kind
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rows_that_lie_otherwise(dtype: torch.dtype, weighted: bool, eps: float | None) -> None:
    set_backend("cuda")
    x, dy = torch.randn(2, 9, 5, 64, device="cuda").to(dtype)
    weight = weight_of(weighted, 64, device="cuda")
    weight = None if weight is None else leaf(weight.to(dtype))

    def all_of(x: Tensor, dy: Tensor, weight: Tensor | None) -> list[Tensor]:
        x = leaf(x)
        return gradients(layer(eps)(x, weight), dy, x, weight)

    expected = all_of(x, dy, weight)
    shifted = torch.empty(x.numel() + 1, device="cuda", dtype=dtype)[1:].view(x.shape).copy_(x)
    wide = torch.empty(9, 5, 80, device="cuda", dtype=dtype)[..., 8:72].copy_(x)
    across = x.transpose(0, 1).contiguous().transpose(0, 1)
    slices = torch.stack([x, x], -1).flatten(-2)[..., ::2]
    of_weight = None
    if weight is not None:
        of_weight = leaf(torch.stack([weight, weight], -1).detach()[:, 1])
    for like_x in (shifted, wide, across, slices, with_gaps(x, 8)):
        for like_dy in (dy, with_gaps(dy, 4), dy.mT.contiguous().mT):
            for one, other in zip(all_of(like_x, like_dy, of_weight), expected, strict=True):
                assert torch.equal(one, other)
    one_row = dy[0, 0].expand_as(x)
    for one, other in zip(
        all_of(x, one_row, weight), all_of(x, one_row.contiguous(), weight), strict=True
    ):
        assert torch.equal(one, other)


@gpu
@pytest.mark.parametrize("width", [640, 4096])
def test_the_kernels_give_the_same_bits_twice_and_in_a_graph(width: int) -> None:
    set_backend("cuda")
    x, dy = torch.randn(2, 5000, width, device="cuda").bfloat16()
    weight = torch.randn(width, device="cuda").bfloat16()

    def both() -> list[Tensor]:
        y = torch.ops.eri.scale_rows(x, weight, EPS)
        return [y, *torch.ops.eri.scale_rows_backward(dy, x, weight, EPS, True)]

    loaded()
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
def test_what_is_not_finite_stays_in_its_row() -> None:
    set_backend("cuda")
    x = torch.randn(3, 16, device="cuda", dtype=torch.bfloat16)
    x[1, 4] = torch.inf
    x.requires_grad_()
    y = mul_rows(x, torch.full_like(x[0], 2))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y[1, 4] == torch.inf and y[[0, 2]].isfinite().all() and (dx == 2).all()
    y = rms_norm(x, None, EPS)
    assert y[1, 4].isnan() and (y[1, :4] == 0).all() and y[[0, 2]].isfinite().all()


@gpu
def test_what_the_kernels_cannot_do_the_reference_does() -> None:
    said: list[str] = []
    set_backend("auto", said.append)
    for x in (torch.randn(3, 10, device="cuda"), torch.randn(0, 8, device="cuda")):
        module = RMSNorm(x.shape[-1], device="cuda")
        expected = scale_rows_reference(x, module.weight, module.eps)
        assert torch.equal(module(x), expected)
    assert any("rms_norm: PyTorch's own operations" in s and "rows of 10" in s for s in said)
    assert any("x has 0 rows" in line for line in said)


@gpu
def test_autocast_still_computes_norms_in_float32() -> None:
    set_backend("auto", lambda _: None)
    x = torch.randn(3, 16, device="cuda", dtype=torch.bfloat16)
    plain = RMSNorm(elementwise_affine=False)
    with torch.autocast("cuda", torch.bfloat16):
        assert plain(x).dtype == scale_rows_reference(x, None, EPS).dtype
        assert RMSNorm(16, device="cuda")(x.float()).dtype == torch.float32


@gpu
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dy": lambda x: x.half()}, "dy is of type Half"),
        ({"dy": lambda x: x[:2]}, "dy has 32 elements, expected 4 rows of 16"),
        ({"dy": lambda x: with_gaps(x, 4)}, "dy has no rows at one stride"),
        ({"x": lambda x: x.double()}, "x is of type Double"),
        ({"x": lambda x: x.t().contiguous().t()}, "x has no rows at one stride"),
        ({"x": lambda x: x.new_zeros(4, 8200)}, "x has rows of 8200 elements"),
        ({"weight": lambda x: x[0, :8]}, "weight has 8 elements, expected 16"),
        ({"weight": lambda x: x[0].float()}, "weight is of type Float"),
        ({"weight": lambda x: x[0].cpu()}, "weight is not on cuda"),
    ],
)
def test_the_kernel_names_what_it_cannot_take(
    changed: dict[str, Callable[[Tensor], Tensor]], message: str
) -> None:
    loaded()
    x = torch.zeros(4, 16, device="cuda", dtype=torch.bfloat16)
    given = {"dy": x, "x": x, "weight": x[0]}
    for name, change in changed.items():
        given[name] = change(x)
    if message.endswith("8200 elements"):
        given = {"dy": given["x"], "x": given["x"], "weight": given["x"][0]}
    with pytest.raises(RuntimeError, match=f"scale_rows: {message}"):
        torch.ops.eri.scale_rows_backward(*given.values(), EPS, True)


def eager_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rms: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What PyTorch's autograd computes; for a norm from what it keeps of the rows."""
    if rms is None:
        return dy * weight, (dy * x).sum(0)
    return torch.ops.aten._fused_rms_norm_backward(dy, x, x.shape[-1:], rms, weight, [True, True])


@gpu
def test_bandwidth() -> None:
    loaded()
    copied = copy_bandwidth()
    back = torch.ops.eri.scale_rows_backward
    print(f"\na copy moves {copied / 1e12:.2f} TB/s")
    for (rows, width), eps in product([(4096, 640), (16384, 1280), (16384, 4096)], [EPS, None]):
        weight = torch.ones(width, device="cuda", dtype=torch.bfloat16)
        sets = [torch.randn(2, rows, width, device="cuda").bfloat16() for _ in range(4)]
        kept: list[Tensor | None] = [None] * len(sets)
        if eps is not None:
            kept = [torch.ops.aten._fused_rms_norm(x, [width], weight, eps)[1] for x, _ in sets]
        cases: list[tuple[str, int, Callable[[int], object], Callable[[int], object]]] = [
            (
                *("forward", 4, lambda i, e=eps, s=sets, w=weight: layer(e)(s[i][0], w)),
                lambda i, e=eps, s=sets, w=weight: scale_rows_reference(s[i][0], w, e),
            ),
            (
                *("backward", 6),
                lambda i, e=eps, s=sets, w=weight, b=back: b(s[i][1], s[i][0], w, e, True),
                lambda i, s=sets, w=weight, k=kept: eager_backward(s[i][1], s[i][0], w, k[i]),
            ),
        ]
        for name, size, kernel, eager in cases:
            ours, theirs = microseconds(kernel), microseconds(eager)
            reached = size * rows * width / ours * 1e6
            print(
                f"{rows:6d} x {width} {'MulRows' if eps is None else 'RMSNorm'} {name:8s}: "
                f"{ours:7.1f} us, {reached / 1e12:.2f} TB/s, eager {theirs:7.1f} us"
            )
            if rows * width >= 2**26:
                assert reached > (0.7 if name == "forward" else 0.5) * copied

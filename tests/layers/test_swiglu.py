from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eri.errors import ConfigError
from eri.layers import SwiGLU
from eri.layers.backend import set_backend
from eri.layers.build import SOURCES
from eri.layers.swiglu import (
    MOST_ELEMENTS,
    swiglu,
    swiglu_backward_reference,
    swiglu_reference,
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


def test_c103_equals_its_formula(device: torch.device) -> None:
    layer = SwiGLU(5, 7, device=device)
    x = torch.randn(2, 4, 3, device=device)
    y = layer(x)
    w1, w2, w3 = layer.provider_views()
    assert w1 is not None and w2 is not None and w3 is not None
    assert (w1.shape, w2.shape, w3.shape) == ((3, 7), (3, 7), (7, 5))
    gate = x @ w1
    torch.testing.assert_close(y, (gate * gate.sigmoid() * (x @ w2)) @ w3)
    assert len(list(layer.parameters())) == 3


def test_c103_gradient_of_the_gate_has_the_sign_of_silu() -> None:
    layer = SwiGLU(1, 1).double()
    x = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    layer(x)
    with torch.no_grad():
        for weight, value in zip(layer.for_update(), (-1.0, 1.0, 1.0), strict=True):
            weight.fill_(value)
    (gradient,) = torch.autograd.grad(layer(x), layer.w1.weight)
    # the slope of SiLU at -1
    assert gradient.item() == pytest.approx(0.0723294881, abs=1e-9)


def test_c091_initial_weights_are_kaiming_normal() -> None:
    layer = SwiGLU(128, 512)
    layer(torch.zeros(1, 256))
    for linear, fan_in in ((layer.w1, 256), (layer.w2, 256), (layer.w3, 512)):
        assert linear.weight.std().item() == pytest.approx(2 / fan_in**0.5, rel=0.02)


def leaf(numbers: Tensor) -> Tensor:
    return numbers.detach().requires_grad_()


def test_the_backward_formula_is_autograds() -> None:
    gate, value = (3 * torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in "gv")
    dy = torch.randn_like(gate)
    _, *expected = gradients(gate * gate.sigmoid() * value, dy, gate, value)
    found = swiglu_backward_reference(dy, gate.detach(), value.detach())
    torch.testing.assert_close([*found], expected)


def test_the_op_has_the_right_gradients_of_both_orders() -> None:
    given = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(torch.ops.eri.swiglu, given)
    assert torch.autograd.gradgradcheck(torch.ops.eri.swiglu, given)


def test_where_there_are_kernels_the_layer_takes_the_op() -> None:
    layer, x = SwiGLU(4, 8), torch.randn(2, 3, 8, requires_grad=True)
    dy = torch.randn(2, 3, 4)
    layer(x)
    expected = gradients(layer(x), dy, x, *layer.parameters())
    with ops_on_cpu():
        y = swiglu(x, x)
        assert y.grad_fn is not None and "swiglu" in y.grad_fn.name()
        torch.testing.assert_close(gradients(layer(x), dy, x, *layer.parameters()), expected)
        with pytest.raises(ConfigError, match="swiglu: gate has 15 elements"):
            SwiGLU(4, 5)(torch.zeros(3, 2))


def test_a_gradient_can_be_differentiated_again(device: torch.device) -> None:
    gate, value = (torch.randn(5, 16, device=device, requires_grad=True) for _ in range(2))

    def twice(y: Tensor) -> list[Tensor]:
        (d_gate,) = torch.autograd.grad(y.square().sum(), gate, create_graph=True)
        return [*torch.autograd.grad(d_gate.square().sum(), [gate, value])]

    expected = twice(swiglu_reference(gate, value))
    with where_ops_are(device):
        torch.testing.assert_close(twice(swiglu(gate, value)), expected)


@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 32), (16,)])
def test_the_ops_are_registered_as_pytorch_wants_them(
    shape: tuple[int, ...], device: torch.device
) -> None:
    if device.type == "cuda":
        loaded()
    gate, value, dy = (torch.randn(shape, device=device) for _ in range(3))
    forward, backward = torch.ops.eri.swiglu.default, torch.ops.eri.swiglu_backward.default
    torch.library.opcheck(forward, (leaf(gate), leaf(value)))
    torch.library.opcheck(forward, (gate, leaf(value)))
    torch.library.opcheck(backward, (dy, gate, value))


def test_the_ops_give_contiguous_results() -> None:
    across = torch.randn(6, 4).t()
    torch.library.opcheck(torch.ops.eri.swiglu.default, (across, across))
    torch.library.opcheck(torch.ops.eri.swiglu_backward.default, (across, across, across))


def test_reasons_are_in_words() -> None:
    half, double = torch.float16, torch.float64
    one, other = torch.zeros(2, 4), torch.zeros(2, 8)
    assert unsupported(one, one) is None
    assert unsupported(other.to(half), other.to(half)) is None
    found = unsupported(torch.zeros(3, 4, dtype=half), torch.zeros(3, 4, dtype=half))
    assert found == "gate has 12 elements, not a multiple of 8"
    found = unsupported(one.to(double), one.to(double))
    assert found == "gate is float64, not float32, float16 or bfloat16"
    assert unsupported(one, one.to(half)) == "gate is float32, and value float16"
    assert unsupported(one, other) == "gate is [2, 4], and value [2, 8]"
    assert unsupported(one[:0], one[:0]) == "gate has 0 elements, not 1 to 17179869183"


def test_the_limit_is_that_of_the_header() -> None:
    header = (SOURCES / "swiglu.h").read_text()
    assert f"kSwigluElements = 1LL << {MOST_ELEMENTS.bit_length() - 1};" in header


def test_the_backend_cuda_refuses_other_devices() -> None:
    set_backend("cuda")
    with pytest.raises(ConfigError, match="this is cpu"):
        swiglu(torch.zeros(2, 8), torch.zeros(2, 8))


# ------------------------------------------------------------------------------------- the kernels

gpu = pytest.mark.gpu
SHAPES = [(1024, 5120), (2, 4096, 2560), (3, 77, 640), (1, 8), (513, 1288), (16,), (7, 520)]


def loaded() -> None:
    """Builds and loads the kernels and refuses anything else."""
    set_backend("cuda")
    swiglu(torch.ones(8, device="cuda"), torch.ones(8, device="cuda"))


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_are_no_less_exact_than_eager(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    set_backend("cuda")
    gate, value = (leaf((3 * torch.randn(shape, device="cuda")).to(dtype)) for _ in range(2))
    dy = torch.randn(shape, device="cuda").to(dtype)
    true = leaf(gate.double()), leaf(value.double())
    truth = gradients(swiglu_reference(*true), dy.double(), *true)
    eager = gradients(swiglu_reference(gate, value), dy, gate, value)
    found = gradients(swiglu(gate, value), dy, gate, value)
    for one, other, exact in zip(found, eager, truth, strict=True):
        assert one.dtype == dtype and one.shape == exact.shape and one.is_contiguous()
        assert error(one, exact) <= 2 * error(other, exact) + ulp(exact, dtype)


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_gate_is_exact_to_its_last_place(dtype: torch.dtype) -> None:
    set_backend("cuda")
    gates = torch.arange(-(2**15), 2**15, device="cuda").to(torch.int16).view(dtype)
    gates = gates[gates.isfinite() & (gates > -80)]  # below, all that is left is under 1e-33
    gates = torch.cat([gates, gates.new_zeros(-len(gates) % 8)])
    found = swiglu(gates, torch.ones_like(gates)).double()
    truth = swiglu_reference(gates.double(), torch.ones_like(gates).double())
    # half a unit is the cast's; nothing below the smallest normal number is promised
    allowed = 0.52 * torch.finfo(dtype).eps * truth.abs() + torch.finfo(dtype).smallest_normal
    wrong = (found - truth).abs() > allowed
    assert not wrong.any(), f"{gates[wrong][:8]}: {found[wrong][:8]}, not {truth[wrong][:8]}"


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gates_far_out_are_those_of_eager(dtype: torch.dtype) -> None:
    set_backend("cuda")
    far = [torch.inf, -torch.inf, torch.nan, 2e4, -2e4, -100.0, 100.0, 0.0]
    gate = leaf(torch.tensor(far, device="cuda", dtype=dtype))
    one = torch.ones_like(gate)
    found, expected = swiglu(gate, one), swiglu_reference(gate, one)
    torch.testing.assert_close(found, expected, equal_nan=True, atol=1e-30, rtol=1e-2)


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_numbers_that_lie_otherwise(dtype: torch.dtype) -> None:
    set_backend("cuda")
    gate, value, dy = torch.randn(3, 9, 5, 64, device="cuda").to(dtype)

    def all_of(gate: Tensor, value: Tensor, dy: Tensor) -> list[Tensor]:
        gate, value = leaf(gate), leaf(value)
        return gradients(swiglu(gate, value), dy, gate, value)

    def shifted(x: Tensor) -> Tensor:
        return torch.empty(x.numel() + 1, device="cuda", dtype=dtype)[1:].view(x.shape).copy_(x)

    def across(x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    expected = all_of(gate, value, dy)
    for change in (shifted, across, lambda x: with_gaps(x, 3)):
        for i in range(3):
            given = [gate, value, dy]
            given[i] = change(given[i])
            for one, other in zip(all_of(*given), expected, strict=True):
                assert torch.equal(one, other)


@gpu
def test_the_kernels_give_the_same_bits_twice_and_in_a_graph() -> None:
    loaded()
    dy, gate, value = torch.randn(3, 1025, 2568, device="cuda").bfloat16()

    def both() -> list[Tensor]:
        y = torch.ops.eri.swiglu(gate, value)
        return [y, *torch.ops.eri.swiglu_backward(dy, gate, value)]

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
    for gate in (torch.randn(3, 5, device="cuda"), torch.randn(0, 8, device="cuda")):
        assert torch.equal(swiglu(gate, gate), swiglu_reference(gate, gate))
    assert any("swiglu: PyTorch's own operations" in s and "15 elements" in s for s in said)
    assert any("gate has 0 elements" in line for line in said)


@gpu
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: (x.half(), x, x), "dy is of type Half"),
        (lambda x: (x[:2], x, x), "dy has 32 elements, expected 64"),
        (lambda x: (x, x, x.t().contiguous().t()), "value has 64 elements, expected 64, and cont"),
        (lambda x: (x, x.double(), x), "gate is of type Double"),
        (lambda x: (x, x, x.cpu()), "value is not on cuda"),
        (lambda x: 3 * (x.flatten()[:12],), "gate has 12 elements, expected a multiple of 8"),
    ],
)
def test_the_kernel_names_what_it_cannot_take(
    wrong: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], message: str
) -> None:
    loaded()
    x = torch.zeros(4, 16, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=f"swiglu: {message}"):
        torch.ops.eri.swiglu_backward(*wrong(x))


@gpu
def test_bandwidth() -> None:
    loaded()
    copied = copy_bandwidth()
    print(f"\na copy moves {copied / 1e12:.2f} TB/s")
    for rows, width in ((1024, 5120), (4096, 5120), (16384, 5120)):
        sets = [torch.randn(3, rows, width, device="cuda").bfloat16() for _ in range(4)]
        cases: list[tuple[str, int, Callable[[int], object], Callable[[int], object]]] = [
            (
                *("forward", 6, lambda i, s=sets: swiglu(s[i][1], s[i][2])),
                lambda i, s=sets: swiglu_reference(s[i][1], s[i][2]),
            ),
            (
                *("backward", 10, lambda i, s=sets: torch.ops.eri.swiglu_backward(*s[i])),
                lambda i, s=sets: eager_backward(*s[i]),
            ),
        ]
        for name, size, kernel, eager in cases:
            ours, theirs = microseconds(kernel), microseconds(eager)
            reached = size * rows * width / ours * 1e6
            print(
                f"{rows:6d} x {width} {name:8s}: {ours:7.1f} us, {reached / 1e12:.2f} TB/s, "
                f"eager {theirs:7.1f} us"
            )
            if rows * width >= 2**26:
                assert reached > 0.7 * copied


def eager_backward(dy: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """What PyTorch's autograd computes; it keeps silu(gate)."""
    kept = gate  # of its size: the time is the same
    return torch.ops.aten.silu_backward(dy * value, gate), dy * kept

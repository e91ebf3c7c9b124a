import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from eri.errors import ConfigError
from eri.layers import Linear, LoRALinear
from eri.layers.backend import Backend, set_backend
from eri.layers.flat import Flat
from eri.layers.lora_linear import lora_linear, lora_linear_backward_reference, unsupported
from tests.conftest import first_context
from tests.kernel_checks import error, ops_on_cpu, poison, ulp, where_ops_are, with_gaps


def test_c010_documented_fields() -> None:
    layer = LoRALinear(768, 320, 16)
    assert isinstance(layer.base, Linear)
    assert isinstance(layer.lora_a, Linear)
    assert isinstance(layer.lora_b, Linear)
    assert isinstance(layer.scale, float)


def test_c011_shapes() -> None:
    state = LoRALinear(768, 320, 16).state_dict()
    assert {name: tuple(weight.shape) for name, weight in state.items()} == {
        "base.weight": (320, 768),
        "base.bias": (320,),
        "lora_a.weight": (16, 768),
        "lora_b.weight": (320, 16),
    }
    assert LoRALinear(768, 320, 16, bias=False).base.bias is None


def test_c013_scale() -> None:
    assert LoRALinear(8, 8, 4).scale == 1.0
    assert LoRALinear(8, 8, 4, alpha=4).scale == 1.0
    assert LoRALinear(8, 8, 4, alpha=1).scale == 0.25


@pytest.mark.parametrize("shape", [(5, 24), (2, 5, 24)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_c014_output_is_base_plus_scaled_update(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    layer = LoRALinear(24, 40, 4, alpha=8, device=device, dtype=dtype)
    nn.init.normal_(layer.lora_b.weight)
    x = torch.randn(shape, device=device, dtype=dtype)
    exact = layer.base(x).double() + 2 * (
        x.double() @ layer.lora_a.weight.double().T @ layer.lora_b.weight.double().T
    )
    assert (layer(x).double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("rank", [1, 4, 16, 64, 128])
@pytest.mark.parametrize(("width", "out"), [(37, 53), (64, 48)])
def test_c019_any_rank_and_odd_sizes(rank: int, width: int, out: int, device: torch.device) -> None:
    layer = LoRALinear(width, out, rank, alpha=3, device=device)
    nn.init.normal_(layer.lora_b.weight)
    x = torch.randn(7, width, device=device, requires_grad=True)
    leaves = [x, layer.lora_a.weight, layer.lora_b.weight]
    exact_x, a, b = (leaf.detach().double().requires_grad_() for leaf in leaves)
    weight, bias = layer.base.weight.double(), layer.base.bias.double()
    exact = exact_x @ weight.T + bias + 3 / rank * (exact_x @ a.T) @ b.T
    y, g = layer(x), torch.randn(7, out, device=device)
    found = [y, *torch.autograd.grad(y, leaves, g)]
    expected = [exact, *torch.autograd.grad(exact, [exact_x, a, b], g.double())]
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() <= 1e-5 * other.norm()


def test_autocast_computes_in_16_bits_and_trains_float32() -> None:
    layer = LoRALinear(24, 40, 4)
    nn.init.normal_(layer.lora_b.weight)
    x = torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), atol=5e-2, rtol=5e-2)
    y.float().sum().backward()
    assert layer.lora_a.weight.grad is not None
    assert layer.lora_a.weight.grad.dtype == torch.float32


def test_any_pytorch_linear_can_be_adapted() -> None:
    base = nn.Linear(6, 10)
    layer = LoRALinear.from_linear(base, 2)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), F.linear(x, base.weight, base.bias))


def test_repr_tells_rank_and_alpha() -> None:
    layer = LoRALinear(6, 10, 2, alpha=1)
    assert "rank=2, alpha=1, merged=False" in repr(layer)


# ------------------------------------------------------------------------------- as few products

BOTH: tuple[Backend, ...] = ("reference", "auto")
TYPES = [torch.float32, torch.float16, torch.bfloat16]
every_type = pytest.mark.parametrize("dtype", TYPES, ids=str)


def adapted(inputs: int = 16, outputs: int = 24, rank: int = 4, **options: Any) -> LoRALinear:
    """A layer whose update is as large as its base."""
    layer = LoRALinear(inputs, outputs, rank, alpha=2 * rank, **options)
    nn.init.normal_(layer.lora_b.weight)
    return layer


def trained(layer: LoRALinear) -> list[nn.Parameter]:
    return [layer.lora_a.weight, layer.lora_b.weight]


def with_gradients(layer: LoRALinear, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx, ΔA and ΔB."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained(layer)], dy)]


@contextmanager
def by_reference() -> Iterator[None]:
    set_backend("reference")
    try:
        yield
    finally:
        set_backend("auto")


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor], most: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert error(one, other.double()) <= most * torch.linalg.vector_norm(other.double())


def is_fused(y: Tensor) -> bool:
    assert y.grad_fn is not None
    return y.grad_fn.name() == "_LoRALinearBackward"


class Calls(TorchDispatchMode):
    """Notes the names of the operations that run, views left out."""

    VIEWS = ("view", "t", "detach", "slice", "unsqueeze", "transpose", "permute", "expand")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rank", [1, 4, 8, 9])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 1, 3, 5)])
def test_the_function_has_the_right_gradients_of_both_orders(
    shape: tuple[int, ...], bias: bool, rank: int
) -> None:
    x, weight, b0, a, b = (
        torch.randn(sizes, dtype=torch.float64)
        for sizes in (shape, (7, 5), 7, (rank, 5), (7, rank))
    )

    def call(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, weight, b0 if bias else None, a, b, 0.7)

    plain = F.linear(x, weight, b0 if bias else None) + 0.7 * x @ a.T @ b.T
    torch.testing.assert_close(call(x, a, b), plain)
    leaves = [leaf.requires_grad_() for leaf in (x, a, b)]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_the_backward_formula_is_autograds() -> None:
    layer = adapted(dtype=torch.float64)
    x, dy = torch.randn(2, 5, 16).double(), torch.randn(2, 5, 24).double()
    given = (layer.base.weight, *trained(layer), layer.scale)
    found = lora_linear_backward_reference(dy, x, *given)
    torch.testing.assert_close(list(found), with_gradients(layer, x, dy)[1:])


@pytest.mark.parametrize("rank", [4, 8])
def test_where_there_are_kernels_the_layer_takes_them(rank: int) -> None:
    layer, x, dy = adapted(rank=rank), torch.randn(2, 5, 16), torch.randn(2, 5, 24)
    with by_reference():
        assert not is_fused(layer(x))
        expected = with_gradients(layer, x, dy)
    x.requires_grad_()
    with ops_on_cpu():
        with Calls() as forward:
            y = layer(x)
        with Calls() as backward:
            found = torch.autograd.grad(y, [x, *trained(layer)], dy)
    assert is_fused(y)
    assert_near([y, *found], expected)
    products = {"lora_down", "lora_gradient", "addmm", "addmm_", "mm", "bmm", "matmul", "linear"}
    assert [one for one in forward.names if one in products] == ["lora_down", "addmm", "addmm_"]
    ran = [one for one in backward.names if one in products]
    assert ran == ["lora_down", "mm", "addmm_", "lora_gradient"]


@every_type
@pytest.mark.parametrize("rank", [1, 4, 8, 16, 64, 128])
@pytest.mark.parametrize(
    ("shape", "outputs", "bias"),
    [((33, 64), 48, True), ((2, 77, 40), 320, False), ((2, 5, 6, 128), 16, True)],
    ids=str,
)
def test_it_is_no_less_exact_than_eager(
    shape: tuple[int, ...],
    outputs: int,
    bias: bool,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    layer = adapted(shape[-1], outputs, rank, bias=bias, device=device, dtype=dtype)
    x = torch.randn(shape, device=device).to(dtype)
    dy = torch.randn(*shape[:-1], outputs, device=device).to(dtype)
    with by_reference():
        eager = with_gradients(layer, x, dy)
        truth = with_gradients(copy.deepcopy(layer).double(), x.double(), dy.double())
    with where_ops_are(device):
        assert is_fused(layer(x))
        found = with_gradients(layer, x, dy)
    for one, other, exact in zip(found, eager, truth, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and one.is_contiguous()
        assert error(one, exact) <= 2 * error(other, exact) + ulp(exact, one.dtype)


def test_a_vector_is_a_row(device: torch.device) -> None:
    layer, x, dy = adapted(device=device), torch.randn(16), torch.randn(24)
    with where_ops_are(device):
        found = with_gradients(layer, x.to(device), dy.to(device))
        expected = with_gradients(layer, x[None].to(device), dy[None].to(device))
    assert found[0].shape == (24,) and found[1].shape == (16,)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other.view(one.shape))


@every_type
@pytest.mark.parametrize("rank", [1, 5])
def test_what_pads_a_rank_is_zero(rank: int, dtype: torch.dtype, device: torch.device) -> None:
    layer = adapted(rank=rank, device=device, dtype=dtype)
    x, dy = torch.randn(9, 16, device=device).to(dtype), torch.randn(9, 24, device=device).to(dtype)
    with where_ops_are(device):
        expected = with_gradients(layer, x, dy)
        with poison():
            found = with_gradients(layer, x, dy)
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        assert_near([one], [other], 1e-2)


def test_rows_that_lie_otherwise(device: torch.device) -> None:
    layer = adapted(device=device)
    x, dy = torch.randn(3, 5, 16, device=device), torch.randn(3, 5, 24, device=device)
    with where_ops_are(device):
        expected = with_gradients(layer, x, dy)
        shifted = torch.empty(x.numel() + 1, device=device)[1:].view(x.shape).copy_(x)
        across = x.transpose(0, 1).contiguous().transpose(0, 1)
        slices = torch.stack([x, x], -1).flatten(-2)[..., ::2]
        turned = x.mT.contiguous().mT
        for like_x in (shifted, across, slices, turned, with_gaps(x, 4), with_gaps(x, 3)):
            for like_dy in (dy, with_gaps(dy, 8), with_gaps(dy, 1), dy.mT.contiguous().mT):
                found = with_gradients(layer, like_x, like_dy)
                assert_near(found, expected)
        one = dy[0, 0].expand_as(dy)
        found = with_gradients(layer, x, one)
        assert_near(found, with_gradients(layer, x, one.contiguous()))
        layer(x).sum().backward()  # whose gradient is one number
        expected = with_gradients(layer, x, torch.ones_like(dy))[2:]
    grads = [weight.grad for weight in trained(layer) if weight.grad is not None]
    assert_near(grads, expected)


@every_type
@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_no_rows_have_no_gradient(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    layer = adapted(device=device, dtype=dtype)
    x = torch.zeros(shape, device=device, dtype=dtype)
    with where_ops_are(device):
        assert is_fused(layer(x))
        y, dx, da, db = with_gradients(layer, x, x.new_zeros(*shape[:-1], 24))
    assert y.shape == (*shape[:-1], 24) and dx.shape == shape
    for weight, found in zip(trained(layer), (da, db), strict=True):
        assert torch.equal(found, torch.zeros_like(weight))


@pytest.mark.parametrize("wanted", ["x", "a", "b", "xa", "ab", "xb"])
def test_what_is_frozen_gets_no_gradient(wanted: str, device: torch.device) -> None:
    layer = adapted(device=device)
    x, dy = torch.randn(5, 16, device=device), torch.randn(5, 24, device=device)
    leaves = dict(zip("xab", (x.clone(), *trained(layer)), strict=True))
    with where_ops_are(device):
        everything = dict(zip("xab", with_gradients(layer, x, dy)[1:], strict=True))
        for name, one in leaves.items():
            one.requires_grad_(name in wanted)
        layer(leaves["x"]).backward(dy)
        with torch.no_grad():
            assert layer(x).grad_fn is None
    for name, one in leaves.items():
        assert (one.grad is not None) == (name in wanted), name
        if one.grad is not None:
            assert torch.equal(one.grad, everything[name])


def test_nothing_is_computed_that_nobody_wants() -> None:
    layer, x = adapted(), torch.randn(5, 16)

    def backward(y: Tensor) -> list[str]:
        with Calls() as calls:
            y.sum().backward()
        return calls.names

    with ops_on_cpu():
        names = backward(layer(x))
        assert "lora_gradient" in names and not {"mm", "addmm_"} & set(names)
        for weight in trained(layer):
            weight.requires_grad_(False)
        names = backward(layer(x.requires_grad_()))
        assert "lora_gradient" not in names and {"mm", "addmm_"} <= set(names)


@pytest.mark.parametrize("rank", [4, 8])
def test_little_is_kept(rank: int) -> None:
    layer, kept = adapted(rank=rank, dtype=torch.bfloat16), list[tuple[int, ...]]()
    x = torch.randn(5, 16).bfloat16().requires_grad_()
    given = {one.data_ptr() for one in (x, *layer.parameters())}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in given:
            kept.append((*tensor.shape,))
        return tensor

    with ops_on_cpu(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    assert kept == [(5, 8), (8, 16), (8, 24)]  # H, and copies of A and B


def test_a_layer_may_be_computed_again() -> None:
    layer, x, dy = adapted(), torch.randn(5, 16, requires_grad=True), torch.randn(5, 24)
    with ops_on_cpu():
        expected = with_gradients(layer, x, dy)
        y = checkpoint(layer, x, use_reentrant=False)
        found = torch.autograd.grad(y, [x, *trained(layer)], dy)
    assert all(map(torch.equal, [y, *found], expected))


def test_gradients_are_added_up_where_they_are(device: torch.device) -> None:
    layer = adapted(rank=5, device=device)
    flat = Flat(dict(zip("ab", trained(layer), strict=True)))
    batches = [
        (torch.randn(5, 16, device=device), torch.randn(5, 24, device=device)) for _ in range(3)
    ]
    with by_reference():
        each = [with_gradients(layer, *batch)[2:] for batch in batches]
    with where_ops_are(device):
        for x, dy in batches:
            y = layer(x)
            y.backward(dy, retain_graph=True)
        y.backward(dy)  # once more
    views = flat.views(flat.grad)
    for place, name in enumerate("ab"):
        grad = flat.parameters[name].grad
        assert grad is not None and grad.data_ptr() == views[name].data_ptr()
        expected = torch.stack([found[place] for found in [*each, each[-1]]]).sum(0)
        assert_near([views[name]], [expected])


def test_hooks_see_the_gradients() -> None:
    layer, x, seen = adapted(), torch.randn(5, 16, requires_grad=True), list[str]()
    a, b = trained(layer)
    with by_reference():
        expected = with_gradients(layer, x, torch.ones(5, 24))[2]
    a.register_hook(lambda grad: 2 * grad)
    b.register_post_accumulate_grad_hook(lambda _: seen.append("b"))
    layer.register_full_backward_hook(lambda *_: seen.append("layer"))
    with ops_on_cpu():
        (da,) = torch.autograd.grad(layer(x).sum(), a)
        layer(x).sum().backward()
    assert sorted(seen) == ["b", "layer"]
    torch.testing.assert_close([da, a.grad], [2 * expected, 2 * expected])


def test_changed_matrices_are_seen_and_used_ones_may_not_change() -> None:
    layer, x = adapted(), torch.randn(5, 16)
    with ops_on_cpu():
        before = layer(x)
        with torch.no_grad():
            layer.lora_b.weight.mul_(2)
        torch.testing.assert_close(layer(x) - layer.base(x), 2 * (before - layer.base(x)))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            before.sum().backward()


# ------------------------------------------------------------------------- what takes PyTorch's own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merged_layer_is_its_base(dtype: torch.dtype, device: torch.device) -> None:
    layer = adapted(device=device, dtype=dtype)
    x = torch.randn(5, 16, device=device).to(dtype)
    with where_ops_are(device):
        y = layer(x)
        layer.merge()
        assert torch.equal(layer(x), layer.base(x))
        layer.unmerge()
        assert torch.equal(layer(x), y)


def test_dropout_at_work_is_pytorchs(device: torch.device) -> None:
    layer, x = adapted(dropout=0.5, device=device), torch.randn(5, 16, device=device)
    with where_ops_are(device):
        assert not is_fused(layer(x))
        assert is_fused(layer.eval()(x))
        layer.train().dropout.p = 0.0
        assert is_fused(layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_types_are_as_ever(dtype: torch.dtype, device: torch.device) -> None:
    layer = adapted(device=device, dtype=dtype)
    x, dy = torch.randn(5, 16, device=device).to(dtype), torch.randn(5, 24, device=device)
    found: list[list[Tensor]] = []
    for backend in BOTH:
        set_backend(backend, lambda _: None)
        with torch.autocast(device.type, torch.bfloat16):
            y = layer(x)
        assert not is_fused(y)
        found.append([y, *torch.autograd.grad(y, trained(layer), dy.to(y.dtype))])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype
    with where_ops_are(device), torch.autocast(device.type, torch.bfloat16):
        with pytest.raises(ConfigError, match="lora_linear: autocast chooses the types"):
            layer(x)


@first_context
def test_a_backward_pass_under_autocast_is_that_of_its_forward_pass(device: torch.device) -> None:
    layer = adapted(device=device)
    x, dy = torch.randn(5, 16, device=device), torch.randn(5, 24, device=device)
    x.requires_grad_()
    with where_ops_are(device):
        expected = with_gradients(layer, x, dy)
        y = layer(x)
        with torch.autocast(device.type, torch.bfloat16):
            found = torch.autograd.grad(y, [x, *trained(layer)], dy)
    for one, other in zip(found, expected[1:], strict=True):
        assert torch.equal(one, other)


def test_a_gradient_can_be_differentiated_again(device: torch.device) -> None:
    layer = adapted(device=device)
    x = torch.randn(5, 16, device=device, requires_grad=True)

    def twice() -> list[Tensor]:
        leaves = [x, *trained(layer)]
        first = torch.autograd.grad(layer(x).square().sum(), leaves, create_graph=True)
        return [*torch.autograd.grad(sum(one.square().sum() for one in first), leaves)]

    with by_reference():
        expected = twice()
    with where_ops_are(device):
        assert is_fused(layer(x))
        assert_near(twice(), expected)


def test_a_program_of_the_compiler_has_no_op() -> None:
    layer, x = adapted(), torch.randn(3, 16)
    names: list[str] = []

    def note(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compiler.reset()
    with ops_on_cpu():
        found = torch.compile(layer, fullgraph=True, backend=note)(x)
    torch.testing.assert_close(found, layer(x))
    assert any("linear" in name for name in names)
    assert not any("LoRALinear" in name or "lora_down" in name for name in names)


def test_transforms_of_functions_take_pytorchs_operations() -> None:
    layer, x = adapted(), torch.randn(3, 16)
    values = {name: weight.detach() for name, weight in layer.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, values, x).square().sum()

    with ops_on_cpu():
        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)
    with by_reference():
        each = [torch.func.grad(loss)(values, row) for row in x]
    for name in ("lora_a.weight", "lora_b.weight"):
        torch.testing.assert_close(per_sample[name], torch.stack([one[name] for one in each]))


class Twice(nn.Linear):
    """Runs in a way of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_base_with_hooks_or_another_way_to_run_is_called(device: torch.device) -> None:
    set_backend("auto", lambda _: None)
    x, seen = torch.randn(5, 16, device=device), list[str]()
    own = LoRALinear.from_linear(Twice(16, 24, device=device), 4)
    hooked = adapted(device=device)
    hooked.base.register_forward_hook(lambda *_: seen.append("hook"))
    replaced = adapted(device=device)
    replaced.base.forward = lambda x: x.new_zeros(5, 24)
    hooked(x)
    assert seen == ["hook"]
    torch.testing.assert_close(own(x), 2 * F.linear(x, own.base.weight, own.base.bias))
    update = F.linear(F.linear(x, replaced.lora_a.weight), replaced.lora_b.weight)
    torch.testing.assert_close(replaced(x), replaced.scale * update)
    with where_ops_are(device):
        for layer in (own, hooked, replaced):
            with pytest.raises(ConfigError, match=r"the base, \w+, has hooks or a way of its own"):
                layer(x)


def test_a_base_that_trains_gets_its_gradients(device: torch.device) -> None:
    set_backend("auto", lambda _: None)
    layer, x = adapted(device=device), torch.randn(5, 16, device=device)
    layer.base.requires_grad_()
    layer(x).sum().backward()
    assert all(weight.grad is not None for weight in layer.parameters())


def test_reasons_are_in_words() -> None:
    def reason(x: Tensor | None = None, layer: LoRALinear | None = None) -> str | None:
        return unsupported(torch.zeros(3, 16) if x is None else x, layer or adapted())

    assert reason() is None
    assert all(
        reason(torch.zeros(3, 16).to(dtype), adapted(dtype=dtype)) is None for dtype in TYPES
    )
    assert reason(torch.zeros(3, 16).half()) == "x is float16, and the base float32"
    assert reason(torch.zeros(3, 16).double()) == "x is float64, not float32, float16 or bfloat16"
    half = adapted(dtype=torch.float16).half()
    assert reason(torch.zeros(3, 16).half(), half) == "A is float16 on cpu, not float32 beside x"
    away = adapted()
    away.lora_b.to("meta")
    assert reason(layer=away) == "B is float32 on meta, not float32 beside x"
    widths = "it maps {} numbers to {}, not multiples of {}"
    assert reason(torch.zeros(3, 18), adapted(18)) == widths.format(18, 24, 4)
    assert reason(layer=adapted(16, 6)) == widths.format(16, 6, 4)
    odd = torch.zeros(3, 12).half(), adapted(12, dtype=torch.float16)
    assert reason(*odd) == widths.format(12, 24, 8)
    assert reason(layer=adapted(rank=4097)) == "its rank is 4097, more than 4096"
    many = torch.zeros(1, 16).expand(2**30, 16)
    assert reason(many) == "x has 1073741824 rows, not less than 1073741824"
    hooked = adapted()
    hooked.base.register_forward_pre_hook(lambda *_: None)
    assert reason(layer=hooked) == "the base, Linear, has hooks or a way of its own to run"
    training = adapted()
    training.base.bias.requires_grad_()
    assert reason(layer=training) == "the base trains"


def test_the_backend_cuda_refuses_other_devices_and_what_the_kernels_cannot_do() -> None:
    set_backend("cuda")
    with pytest.raises(ConfigError, match="this is cpu"):
        adapted()(torch.zeros(2, 16))
    with ops_on_cpu(), pytest.raises(ConfigError, match="lora_linear: it maps 18 numbers to 24"):
        adapted(18)(torch.zeros(2, 18))


def test_a_wrong_width_is_named_all_the_same() -> None:
    with (
        ops_on_cpu(),
        pytest.raises(ValueError, match=r"expected an input of shape \[\.\.\., 16\]"),
    ):
        adapted()(torch.zeros(2, 12))


# ------------------------------------------------------------------------------------- the kernels

gpu = pytest.mark.gpu


@gpu
@first_context
@every_type
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "rank"),
    [(4096, 1280, 1280, 16), (308, 2048, 640, 4), (1000, 640, 5120, 64), (77, 104, 328, 13)],
)
def test_the_kernels_are_no_less_exact_than_eager(
    tokens: int, inputs: int, outputs: int, rank: int, dtype: torch.dtype
) -> None:
    layer = adapted(inputs, outputs, rank, device="cuda", dtype=dtype)
    nn.init.normal_(layer.lora_b.weight, std=rank**-0.5)
    x = torch.randn(2, tokens, inputs, device="cuda").to(dtype)
    dy = torch.randn(2, tokens, outputs, device="cuda").to(dtype)
    with by_reference():
        eager = with_gradients(layer, x, dy)
        truth = with_gradients(copy.deepcopy(layer).double(), x.double(), dy.double())
    set_backend("cuda")
    found = with_gradients(layer, x, dy)
    for one, other, exact in zip(found, eager, truth, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert error(one, exact) <= 2 * error(other, exact) + ulp(exact, one.dtype)


@gpu
@first_context
@pytest.mark.parametrize("rank", [4, 16])
def test_a_step_gives_the_same_bits_twice_and_in_a_graph(rank: int) -> None:
    set_backend("cuda")
    layer = adapted(640, 320, rank, device="cuda", dtype=torch.bfloat16)
    flat = Flat(dict(zip("ab", trained(layer), strict=True)))
    x = torch.randn(2, 500, 640, device="cuda").bfloat16().requires_grad_()
    dy = torch.randn(2, 500, 320, device="cuda").bfloat16()

    def step() -> list[Tensor]:
        flat.grad.zero_()
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        y.backward(dy, inputs=trained(layer))
        return [y.detach(), dx, flat.grad]

    def fresh() -> list[Tensor]:
        return [one.clone() for one in step()]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        first, again = fresh(), fresh()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        graph.replay()
        replayed = [one.clone() for one in captured]
        flat.master.mul_(0.5)  # as an optimizer's kernel does: behind autograd's back
        graph.replay()
        changed = [one.clone() for one in captured]
        expected = fresh()
    stream.synchronize()
    for once, twice in zip(first, again, strict=True):
        assert once.count_nonzero() > 0 and torch.equal(once, twice)
    assert torch.equal(first[2], replayed[2]) and torch.equal(changed[2], expected[2])
    assert_near(replayed[:2], first[:2], 1e-2)  # a library may choose another product there
    assert_near(changed[:2], expected[:2], 1e-2)
    for one, before in zip(changed, first, strict=True):
        assert error(one, before.double()) > 0.1 * before.double().norm()


@gpu
@first_context
def test_what_the_kernels_cannot_do_the_reference_does() -> None:
    said: list[str] = []
    set_backend("auto", said.append)
    layer, x = adapted(10, 12, device="cuda"), torch.randn(3, 10, device="cuda")
    found = with_gradients(layer, x, x.new_ones(3, 12))
    with by_reference():
        expected = with_gradients(layer, x, x.new_ones(3, 12))
    assert all(map(torch.equal, found, expected))
    assert any("lora_linear: PyTorch's own operations" in s and "maps 10" in s for s in said)

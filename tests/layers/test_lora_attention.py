import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from eri.layers import Linear, LoRAAttention, LoRALinear
from eri.layers.backend import set_backend
from eri.layers.heads import merge_heads, split_heads
from tests.conftest import first_context
from tests.kernel_checks import error, gradients, ops_on_cpu, ulp, where_ops_are

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")


def reference(layer: LoRAAttention, x: Tensor, context: Tensor) -> Tensor:
    q, k, v = (
        split_heads(linear(source), layer.heads)
        for linear, source in ((layer.to_q, x), (layer.to_k, context), (layer.to_v, context))
    )
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return layer.to_out(merge_heads(weights @ v))


def test_c079_documented_form_has_four_zero_updates(device: torch.device) -> None:
    layer = LoRAAttention(64, 4, 8, device=device)
    projections = [getattr(layer, name) for name in PROJECTIONS]
    assert all(isinstance(projection, LoRALinear) for projection in projections)
    assert all(projection.rank == 8 for projection in projections)
    x = torch.randn(2, 10, 64, device=device)
    plain = LoRAAttention(64, 4, device=device)
    state = {name.replace(".base", ""): value for name, value in layer.state_dict().items()}
    plain.load_state_dict({name: v for name, v in state.items() if "lora" not in name})
    assert torch.equal(layer(x), plain(x))
    trained = {name for name, weight in layer.named_parameters() if weight.requires_grad}
    assert trained == {f"{name}.lora_{part}.weight" for name in PROJECTIONS for part in "ab"}
    assert all(weight.requires_grad for weight in plain.parameters())


def test_without_rank_the_projections_are_plain() -> None:
    layer = LoRAAttention(64, 4, norm_groups=None)
    assert all(type(getattr(layer, name)) is Linear for name in PROJECTIONS)
    assert set(layer.state_dict()) == {
        "to_q.weight",
        "to_k.weight",
        "to_v.weight",
        "to_out.weight",
        "to_out.bias",
    }


def test_c080_heads_must_divide_channels() -> None:
    with pytest.raises(ValueError, match=r"channels = 64 is not divisible by heads = 5"):
        LoRAAttention(64, 5, 8)


def test_d11_tokens_give_the_attention_alone(device: torch.device) -> None:
    layer = LoRAAttention(64, 4, device=device)
    x = torch.randn(2, 10, 64, device=device)
    torch.testing.assert_close(layer(x), reference(layer, x, x))


def test_d11_a_map_is_normalised_attended_and_added_to(device: torch.device) -> None:
    layer = LoRAAttention(64, 4, 8, device=device)
    assert layer.norm is not None
    x = torch.randn(2, 64, 3, 5, device=device)
    tokens = F.group_norm(x, 32).flatten(2).mT
    expected = x + reference(layer, tokens, tokens).mT.reshape(x.shape)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("shape", [(2, 10, 64), (2, 64, 3, 5)])
def test_context_gives_keys_and_values(shape: tuple[int, ...], device: torch.device) -> None:
    layer = LoRAAttention(64, 4, context_dim=24, head_dim=8, device=device)
    assert layer.to_k.weight.shape == (32, 24)  # type: ignore[union-attr]
    x = torch.randn(shape, device=device)
    context = torch.randn(2, 7, 24, device=device)
    y = layer(x, context)
    assert y.shape == x.shape
    if x.dim() == 3:
        torch.testing.assert_close(y, reference(layer, x, context))


def test_wrong_inputs_are_named() -> None:
    layer = LoRAAttention(64, 4, context_dim=24)
    tokens = torch.zeros(2, 5, 64)
    for arguments, message in (
        ((torch.zeros(2, 5, 63),), r"\[B, T, 64\] or \[B, 64, H, W\], found \[2, 5, 63\]"),
        ((tokens, torch.zeros(2, 7, 25)), r"\[2, S, 24\] for context, found \[2, 7, 25\]"),
        ((tokens, torch.zeros(3, 7, 24)), r"\[2, S, 24\] for context, found \[3, 7, 24\]"),
        ((tokens,), r"\[2, S, 24\] for tokens of its own, found \[2, 5, 64\]"),
    ):
        with pytest.raises(ValueError, match=f"LoRAAttention: expected .*{message}"):
            layer(*arguments)
    with pytest.raises(ValueError, match="maps need norm_groups"):
        LoRAAttention(64, 4, norm_groups=None)(torch.zeros(2, 64, 3, 5))


# ------------------------------------------------------------------------------ as lean blocks do


def adapted(
    channels: int = 128, heads: int = 2, rank: int | None = 4, **options: Any
) -> LoRAAttention:
    layer = LoRAAttention(channels, heads, rank, context_dim=24, norm_groups=None, **options)
    for module in layer.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_b.weight, std=0.1)
    return layer


def type_of(layer: LoRAAttention) -> torch.dtype:
    """Of the frozen weights."""
    return next(weight.dtype for weight in layer.parameters() if not weight.requires_grad)


def made_by(y: Tensor) -> set[str]:
    """The names of all functions that made a tensor."""
    names, functions = set[str](), [y.grad_fn]
    while functions:
        if (function := functions.pop()) is not None:
            names.add(function.name())
            functions += [before for before, _ in function.next_functions]
    return names


def with_gradients(layer: LoRAAttention, x: Tensor, context: Tensor, dy: Tensor) -> list[Tensor]:
    """y, and the gradients of x, the context and all that trains."""
    x, context = x.detach().requires_grad_(), context.detach().requires_grad_()
    trained = [weight for weight in layer.parameters() if weight.requires_grad]
    return gradients(layer(x, context), dy, x, context, *trained)


def assert_exact(layer: LoRAAttention, queries: int, keys: int, device: torch.device) -> None:
    """Its errors are at most twice those of PyTorch's operations."""
    dtype = type_of(layer)
    x, dy = torch.randn(2, 2, queries, layer.channels, device=device).to(dtype)
    context = torch.randn(2, keys, layer.context_dim, device=device).to(dtype)
    set_backend("reference")
    eager = with_gradients(layer, x, context, dy)
    exact = copy.deepcopy(layer).double(), x.double(), context.double(), dy.double()
    truth = with_gradients(*exact)
    with where_ops_are(device):
        assert {"_AttendBackward", "_LoRALinearBackward"} <= made_by(layer(x, context))
        found = with_gradients(layer, x, context, dy)
    assert len(found) == 11
    for one, other, true in zip(found, eager, truth, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert error(one, true) <= 2 * error(other, true) + ulp(true, one.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [40, 64, 80, 160])
def test_a_short_context_takes_the_op_and_is_no_less_exact(
    size: int, dtype: torch.dtype, device: torch.device
) -> None:
    assert_exact(adapted(2 * size, device=device, dtype=dtype), 19, 7, device)


@pytest.mark.parametrize(
    ("changed", "keys"),
    [({}, 81), ({"dtype": torch.float32}, 7), ({"head_dim": 48}, 7)],
    ids=["keys", "type", "heads"],
)
def test_other_contexts_are_pytorchs(changed: dict[str, Any], keys: int) -> None:
    layer = adapted(**{"dtype": torch.bfloat16, **changed})
    x, context = torch.randn(2, 5, 128), torch.randn(2, keys, 24)
    with ops_on_cpu():
        names = made_by(layer(x.to(type_of(layer)), context.to(type_of(layer))))
    assert "_LoRALinearBackward" in names and "_AttendBackward" not in names


def test_without_a_context_attention_is_pytorchs() -> None:
    layer = LoRAAttention(128, 2, 4, norm_groups=None, dtype=torch.bfloat16)
    x = torch.randn(2, 5, 128).bfloat16()
    with ops_on_cpu():
        assert "_AttendBackward" not in made_by(layer(x))
        assert "_AttendBackward" in made_by(layer(x, x))
    assert not {"_AttendBackward", "_LoRALinearBackward"} & made_by(layer(x, x))


def test_without_rank_a_context_takes_the_op(device: torch.device) -> None:
    layer = adapted(rank=None, device=device, dtype=torch.bfloat16)
    x = torch.randn(2, 5, 128, device=device).bfloat16()
    with where_ops_are(device):
        assert "_AttendBackward" in made_by(layer(x, x[..., :24]))


def test_a_map_takes_the_op(device: torch.device) -> None:
    layer = LoRAAttention(128, 2, 4, context_dim=24, device=device, dtype=torch.bfloat16)
    x = torch.randn(2, 128, 3, 5, device=device).bfloat16()
    context = torch.randn(2, 7, 24, device=device).bfloat16()
    set_backend("reference")
    expected = layer(x, context)
    with where_ops_are(device):
        y = layer(x, context)
    assert "_AttendBackward" in made_by(y)
    assert (y - expected).norm() <= 2e-2 * expected.norm()


def test_a_gradient_of_attention_can_be_differentiated_again(device: torch.device) -> None:
    layer = adapted(device=device, dtype=torch.bfloat16)
    x = torch.randn(2, 5, 128, device=device).bfloat16().requires_grad_()
    context = torch.randn(2, 7, 24, device=device).bfloat16().requires_grad_()

    def twice(layer: LoRAAttention, x: Tensor, context: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(
            layer(x, context).square().sum(), (x, context), create_graph=True
        )
        return [*torch.autograd.grad(sum(one.square().sum() for one in first), (x, context))]

    set_backend("reference")
    exact = copy.deepcopy(layer).double(), x.detach().double(), context.detach().double()
    with sdpa_kernel(SDPBackend.MATH):  # of PyTorch's the only one with such gradients
        truth = twice(exact[0], *(leaf.requires_grad_() for leaf in exact[1:]))
    with where_ops_are(device):
        found = twice(layer, x, context)
    for one, true in zip(found, truth, strict=True):
        assert error(one, true) <= 5e-2 * true.norm()


def test_a_program_of_the_compiler_has_no_op() -> None:
    layer = adapted(dtype=torch.bfloat16)
    x, context = torch.randn(2, 5, 128).bfloat16(), torch.randn(2, 7, 24).bfloat16()
    names: list[str] = []

    def note(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compiler.reset()
    with ops_on_cpu():
        torch.compile(layer, fullgraph=True, backend=note)(x, context)
    assert any("scaled_dot_product_attention" in name for name in names)
    assert not any("Attend" in name or "cross_attention" in name for name in names)


@pytest.mark.gpu
@first_context
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "queries"), [(64, 4096), (64, 1024), (40, 1000), (160, 77)])
def test_the_kernels_are_no_less_exact_than_pytorchs(
    size: int, queries: int, dtype: torch.dtype
) -> None:
    layer = adapted(8 * size, 8, 16, device="cuda", dtype=dtype)
    assert_exact(layer, queries, 77, torch.device("cuda"))


@pytest.mark.gpu
@first_context
def test_attention_to_words_runs_in_a_graph() -> None:
    set_backend("cuda")
    layer = adapted(device="cuda", dtype=torch.bfloat16)
    x, context, dy = (
        torch.randn(2, *sizes, device="cuda").bfloat16()
        for sizes in ((64, 128), (77, 24), (64, 128))
    )
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        first = with_gradients(layer, x, context, dy)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = with_gradients(layer, x, context, dy)
        graph.replay()
    stream.synchronize()
    for one, other in zip(captured, first, strict=True):
        assert one.count_nonzero() > 0
        assert error(one, other.double()) <= 1e-2 * other.double().norm()

"""What holds for every layer: dtypes, layouts, gradients, compilation, autocast, copies."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from eri import layers as eri


class Self(nn.Module):
    """Attention of a tensor to itself, with a mask that leaves one query blind."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.ones(5, 5, dtype=torch.bool, device=x.device).tril(-1)
        return self.attention(x, x, x, seen, True)


def fixed_weight() -> Tensor:
    return torch.linspace(-1, 1, 8 * 5).view(8, 5)


TOKENS, MAP = (3, 5, 8), (2, 8, 5, 6)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: eri.Linear(8, 12), TOKENS),
    "Linear.lazy": (lambda: eri.Linear.lazy(12, True), TOKENS),
    "Conv2d": (lambda: eri.Conv2d(8, 4, 3, 2, 1), MAP),
    "Conv2d-grouped": (lambda: eri.Conv2d(8, 4, 3, groups=4), MAP),
    "LayerNorm": (lambda: eri.LayerNorm(8), TOKENS),
    "GroupNorm": (lambda: eri.GroupNorm(4, 8), MAP),
    "RMSNorm": (lambda: eri.RMSNorm(8), TOKENS),
    "RMSNorm-plain": (lambda: eri.RMSNorm(elementwise_affine=False), TOKENS),
    "BatchNorm2d": (lambda: eri.BatchNorm2d(8), MAP),
    "ReLU": (lambda: eri.ReLU(), TOKENS),
    "GELU": (lambda: eri.GELU(), TOKENS),
    "SiLU": (lambda: eri.SiLU(), TOKENS),
    "Tanh": (lambda: eri.Tanh(), TOKENS),
    "Sigmoid": (lambda: eri.Sigmoid(), TOKENS),
    "Dropout": (lambda: eri.Dropout(0.5).eval(), TOKENS),
    "MultiHeadAttention": (lambda: Self(eri.MultiHeadAttention(8, 2)), TOKENS),
    "FlashAttention": (lambda: Self(eri.FlashAttention(8, 2)), TOKENS),
    "LoRALinear": (lambda: eri.LoRALinear(8, 12, 2, alpha=4), TOKENS),
    "LoRAConv2d": (lambda: eri.LoRAConv2d(8, 4, 3, 2, padding=1), MAP),
    "LoRAConv2d-grouped": (lambda: eri.LoRAConv2d(8, 4, 3, 2, groups=2), MAP),
    "LoRAAttention-tokens": (lambda: eri.LoRAAttention(8, 2, 2, norm_groups=None), TOKENS),
    "LoRAAttention-map": (lambda: eri.LoRAAttention(8, 2, 2, norm_groups=4), MAP),
    "Conv": (lambda: eri.Conv(3, 4, batch_size=2, padding=1), (4, 5, 6)),
    "LinearWithWeights": (lambda: eri.LinearWithWeights(fixed_weight()), TOKENS),
    "MulRows": (lambda: eri.MulRows(8), TOKENS),
    "Reshape": (lambda: eri.Reshape(8, 15), TOKENS),
    "Residual": (lambda: eri.Residual(eri.Linear(8, 8), eri.SiLU()), TOKENS),
    "SwiGLU": (lambda: eri.SwiGLU(6, 12), TOKENS),
    "SAMultiHead": (lambda: eri.SAMultiHead(8, 4, 2, 5), TOKENS),
    "Layers": (lambda: eri.Layers(eri.MulRows(8), eri.Linear(8, 4)), TOKENS),
}
every_case = pytest.mark.parametrize("name", CASES)


def built(name: str, device: torch.device | str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """A layer with arbitrary weights, each representable in every dtype, and an input for it."""
    build, shape = CASES[name]
    layer, x = build(), torch.randn(shape)
    eri.materialize(layer, x)
    for weight in layer.parameters():
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape).bfloat16() / 4)
    for part in layer.modules():
        if isinstance(part, eri.LinearWithWeights):
            object.__setattr__(part, "weight", part.weight.to(device, dtype))
    return layer.to(device, dtype), x.bfloat16().to(device, dtype)


def sliced(x: Tensor) -> Tensor:
    """The same numbers, every second element of a larger tensor."""
    larger = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype, device=x.device)
    larger[..., ::2] = x
    return larger[..., ::2]


def permuted(x: Tensor) -> Tensor:
    """The same numbers with the channels running fastest (channels_last for a map)."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def forward_and_gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    leaves = [x, *(weight for weight in layer.parameters() if weight.requires_grad)]
    g = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, g)]


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        error = (one.double().cpu() - other.double().cpu()).norm()
        assert error <= tolerance * (1 + other.double().norm().cpu())


@every_case
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, sliced, permuted])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)],
    ids=str,
)
def test_dtypes_and_layouts(
    name: str,
    layout: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    tolerance: float,
    device: torch.device,
) -> None:
    torch.manual_seed(1)
    layer, x = built(name, device, dtype)
    torch.manual_seed(1)
    exact, exact_x = built(name, "cpu", torch.float64)
    expected = forward_and_gradients(exact, exact_x)
    found = forward_and_gradients(layer, layout(x))
    assert found[0].dtype == dtype
    assert_near(found, expected, tolerance)


@every_case
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    layer, x = built(name, "cpu", torch.float64)
    layer.requires_grad_(True)
    names = [key for key, _ in layer.named_parameters()]

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, weights, strict=True)), x)

    inputs = [leaf.detach().requires_grad_() for leaf in (x, *layer.parameters())]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


# PyTorch's compiler uses, while it is imported, what PyTorch 2.11 has deprecated.
compiles = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


@compiles
@every_case
def test_compiles_to_one_graph(name: str, device: torch.device) -> None:
    layer, x = built(name, device, torch.float32)
    expected = forward_and_gradients(copy.deepcopy(layer), x)
    torch.compiler.reset()
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_near(forward_and_gradients(compiled, x), expected, 1e-5)


@every_case
def test_runs_under_autocast(name: str, device: torch.device) -> None:
    layer, x = built(name, device, torch.float32)
    expected = forward_and_gradients(copy.deepcopy(layer), x)
    with torch.autocast(device.type, torch.bfloat16):
        found = forward_and_gradients(layer, x)
    assert_near(found, expected, 5e-2)


@every_case
def test_a_copy_and_a_restored_layer_are_equal(name: str) -> None:
    layer, x = built(name, "cpu", torch.float32)
    layer.eval()
    restored = CASES[name][0]().eval()
    restored.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), restored):
        assert torch.equal(twin(x), layer(x))


@every_case
def test_repr_tells_the_class(name: str) -> None:
    assert repr(CASES[name][0]()).count("(") >= 1
    assert name.split("-")[0].split(".")[0] in repr(CASES[name][0]())


@compiles
def test_value_dependent_layers_compile_with_breaks() -> None:
    torch.compiler.reset()
    table, dropout = eri.Embeddings(9, 4), eri.Dropout.with_seed(0.5, 1)
    tokens = torch.tensor([[1.0, 2.0]])
    assert torch.equal(torch.compile(table, backend="eager")(tokens), table(tokens))
    x = torch.ones(64)
    compiled = torch.compile(eri.Dropout.with_seed(0.5, 1), backend="eager")
    assert all(torch.equal(compiled(x), dropout(x)) for _ in range(3))


def test_every_public_layer_is_a_case() -> None:
    public = {name for name in eri.__all__ if isinstance(getattr(eri, name), type)}
    layers = {name for name in public if issubclass(getattr(eri, name), nn.Module)}
    tested = {name.split("-")[0].split(".")[0] for name in CASES}
    elsewhere = {"Embeddings"}  # its input is tokens
    aliases = {"NewReLu", "Swish", "LoRALayer"}  # the last is what the LoRA layers share
    assert layers - aliases - elsewhere == tested


def test_c001_c002_documented_names_are_exported() -> None:
    documented = """
        Linear Conv2d Conv2dConfig LayerNorm GroupNorm RMSNorm Dropout BatchNorm2d ReLU GELU SiLU
        Tanh Sigmoid MultiHeadAttention FlashAttention
    """
    assert set(documented.split()) <= set(eri.__all__)
    assert all(hasattr(eri, name) for name in eri.__all__)
    assert {"xavier_uniform", "kaiming_normal", "constant", "normal"} <= set(eri.init.__all__)

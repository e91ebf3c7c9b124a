import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eri.layers import Linear, LoRALinear


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

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eri.layers import GELU, NewReLu, ReLU, Sigmoid, SiLU, Swish, Tanh, functional


@pytest.mark.parametrize(
    ("layer", "function", "expected"),
    [
        (ReLU(), functional.relu, F.relu),
        (GELU(), functional.gelu, lambda x: F.gelu(x, approximate="tanh")),
        (GELU("none"), lambda x: functional.gelu(x, "none"), F.gelu),
        (SiLU(), functional.silu, lambda x: x * torch.sigmoid(x)),
        (Tanh(), functional.tanh, torch.tanh),
        (Sigmoid(), functional.sigmoid, lambda x: 1 / (1 + (-x).exp())),
    ],
    ids=["relu", "gelu", "gelu-exact", "silu", "tanh", "sigmoid"],
)
@pytest.mark.parametrize("shape", [(2, 3, 5), (), (7,), (2, 3, 4, 5), (0, 3)])
def test_c045_layer_and_function_agree(
    layer, function, expected, shape: tuple[int, ...], device: torch.device
) -> None:
    x = torch.randn(shape, device=device) * 4
    assert torch.equal(layer(x), function(x))
    torch.testing.assert_close(layer(x), expected(x))


def gelu_gradient(x: Tensor, approximate: str) -> Tensor:
    density = (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
    if approximate == "none":
        return (1 + torch.erf(x / math.sqrt(2))) / 2 + x * density
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    return (1 + inner.tanh()) / 2 + x / 2 * (1 - inner.tanh() ** 2) * slope


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_c046_gelu_gradient_is_that_of_its_own_form(approximate: str, device: torch.device) -> None:
    x = torch.linspace(-10, 10, 401, dtype=torch.float64, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(GELU(approximate)(x).sum(), x)  # type: ignore[arg-type]
    torch.testing.assert_close(gradient, gelu_gradient(x, approximate), atol=1e-12, rtol=1e-9)


def test_c046_gelu_forms_differ_and_tanh_is_the_default() -> None:
    x = torch.linspace(-6, 6, 10001, dtype=torch.float64)
    assert GELU().approximate == "tanh"
    assert 4e-4 < (GELU()(x) - GELU("none")(x)).abs().max() < 4.8e-4
    with pytest.raises(ValueError, match="found 'erf'"):
        GELU("erf")  # type: ignore[arg-type]


def test_c047_relu_gradient_at_zero_is_zero(device: torch.device) -> None:
    x = torch.tensor([-1.0, 0.0, 1.0], device=device, requires_grad=True)
    ReLU()(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 0, 1]


def test_c048_swish_is_silu() -> None:
    assert Swish is SiLU


def test_c089_new_relu_is_relu(device: torch.device) -> None:
    x = torch.tensor([-2.0, float("nan"), 3.0], device=device, requires_grad=True)
    y = NewReLu()(x)
    assert y[1].isnan()
    assert (y[0].item(), y[2].item()) == (0, 3)
    y[2].backward()
    assert x.grad is not None and x.grad.tolist() == [0, 0, 1]
    assert isinstance(NewReLu(), nn.ReLU)

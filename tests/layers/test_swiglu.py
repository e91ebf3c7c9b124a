import pytest
import torch

from eri.layers import SwiGLU


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

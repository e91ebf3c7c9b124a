from typing import Any

import pytest
import torch
import torch.nn.functional as F

from eri.layers import Conv
from eri.layers.init import Initializer


def test_c090_weight_and_bias(device: torch.device) -> None:
    layer = Conv(3, 8, device=device)
    layer(torch.zeros(5, 6, 7, device=device))
    assert layer.weight.shape == (8, 5, 3, 3)
    assert layer.bias is not None and torch.equal(layer.bias, torch.zeros(8, device=device))
    (packed,) = layer.provider_views()
    assert packed is not None and packed.shape == (8 * 5, 3, 3)
    assert torch.equal(packed[2 * 5 + 4], layer.weight[2, 4])
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_c091_initial_weights_are_kaiming_normal_of_the_true_fans() -> None:
    layer = Conv(3, 64, batch_size=4)
    layer(torch.zeros(4 * 32, 5, 5))
    assert layer.weight.std().item() == pytest.approx(2 / (9 * 32) ** 0.5, rel=0.02)
    given = Conv(3, 64, init_weights=Initializer("fixed", "uniform", 0.25))
    given(torch.zeros(32, 5, 5))
    assert 0.249 < given.weight.abs().max() <= 0.25


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_c092_equals_pytorch(k: int, padding: int, stride: int, device: torch.device) -> None:
    layer = Conv(k, 4, 1, padding, stride, device=device)
    x = torch.randn(3, 9, 7, device=device)
    y = layer(x)
    expected = F.conv2d(x[None], layer.weight, layer.bias, stride, padding)[0]
    torch.testing.assert_close(y, expected)
    assert y.shape == (4, (9 - k + 2 * padding) // stride + 1, (7 - k + 2 * padding) // stride + 1)


def test_c092_golden_no_flip_and_zero_padding() -> None:
    layer = Conv(3, 1, padding=1)
    layer(torch.zeros(1, 2, 3))
    with torch.no_grad():
        layer.weight.copy_(torch.arange(9.0).view(1, 1, 3, 3))
        assert layer.bias is not None
        layer.bias.fill_(0.5)
    x = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]])
    y = layer(x)
    # by hand: 4·1 + 5·2 + 7·4 + 8·5 and 3·1 + 4·2 + 5·3 + 6·4 + 7·5 + 8·6
    assert y[0, 0, :2].tolist() == [82.5, 133.5]


def test_c093_gradients_with_stride_two(device: torch.device) -> None:
    layer = Conv(3, 4, 2, 1, 2, device=device)
    x = torch.randn(6, 7, 6, device=device, requires_grad=True)
    y = layer(x)
    leaves = [x, *layer.parameters()]
    expected = F.conv2d(x.view(2, 3, 7, 6), layer.weight, layer.bias, 2, 1).flatten(0, 1)
    g = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, leaves, g)
    )


def test_c094_a_packed_batch_equals_separate_runs(device: torch.device) -> None:
    packed = Conv(3, 4, batch_size=2, padding=1, device=device)
    x = torch.randn(6, 5, 7, device=device)
    y = packed(x)
    single = Conv(3, 4, padding=1, device=device)
    single.load_state_dict(packed.state_dict())
    assert y.shape == (8, 5, 7)
    torch.testing.assert_close(y, torch.cat([single(x[:3]), single(x[3:])]))


def test_c094_wrong_depths_are_refused() -> None:
    layer = Conv(3, 4, batch_size=2)
    with pytest.raises(ValueError, match=r"Conv: depth = 7 is not divisible by batch_size = 2"):
        layer(torch.zeros(7, 5, 5))
    layer(torch.zeros(6, 5, 5))
    with pytest.raises(ValueError, match=r"\[2 · 3, H, W\], found \[8, 5, 5\]"):
        layer(torch.zeros(8, 5, 5))
    with pytest.raises(ValueError, match=r"\[B · C, H, W\], found \[1, 6, 5, 5\]"):
        layer(torch.zeros(1, 6, 5, 5))


@pytest.mark.parametrize("wrong", [{"stride": 0}, {"batch_size": 0}, {"padding": -1}])
def test_sizes_that_are_too_small_are_refused(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"Conv: {name} must be at least .*, found {value}"):
        Conv(3, 4, **wrong)


def test_c086_loaded_weights_are_not_made_again() -> None:
    source = Conv(3, 4, batch_size=2)
    x = torch.randn(6, 5, 5)
    y = source(x)
    target = Conv(3, 4, batch_size=2)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), y)

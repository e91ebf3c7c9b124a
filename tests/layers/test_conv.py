import dataclasses
from typing import get_type_hints

import pytest
import torch
import torch.nn.functional as F

from eri.layers import Conv2d, Conv2dConfig


def test_c021_equals_pytorch(device: torch.device) -> None:
    layer = Conv2d(3, 64, 3, 1, 1, device=device)
    x = torch.randn(2, 3, 32, 48, device=device)
    y = layer(x)
    assert y.shape == (2, 64, 32, 48)
    torch.testing.assert_close(y, F.conv2d(x, layer.weight, layer.bias, 1, 1))


def test_c022_there_is_a_bias_unless_declined() -> None:
    assert Conv2d(3, 4, 3).bias is not None
    assert Conv2d(3, 4, 3, bias=False).bias is None
    assert Conv2d.with_bias(3, 4, 3, 1, 1, True).bias is not None
    assert Conv2d.with_bias(3, 4, 3, 1, 1, False).bias is None


def test_c023_config_has_the_six_documented_fields() -> None:
    config = Conv2dConfig(3, 64, (3, 3), (1, 1), (1, 1))
    names = [field.name for field in dataclasses.fields(config)]
    assert names == [
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "groups",
    ]
    assert config.groups == 1
    hints = get_type_hints(Conv2dConfig)
    assert {hints[name] for name in names[2:5]} == {tuple[int, int]}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.groups = 2  # type: ignore[misc]


def test_c024_from_config_keeps_height_and_width_apart() -> None:
    layer = Conv2d.from_config(Conv2dConfig(3, 4, (3, 1), (2, 1), (1, 0)))
    x = torch.randn(2, 3, 9, 10)
    assert layer.weight.shape == (4, 3, 3, 1)
    assert layer(x).shape == (2, 4, 5, 10)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, (2, 1), (1, 0)))


def test_c025_depthwise_channels_do_not_mix() -> None:
    layer = Conv2d.from_config(Conv2dConfig(64, 64, (3, 3), (1, 1), (1, 1), 64))
    assert layer.weight.shape == (64, 1, 3, 3)
    x = torch.randn(1, 64, 6, 6)
    changed = x.clone()
    changed[:, 5] += 1
    differs = (layer(x) != layer(changed)).flatten(2).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [5]


def test_c026_grouped_equals_pytorch(device: torch.device) -> None:
    layer = Conv2d(64, 128, 3, 1, 1, groups=4, device=device)
    x = torch.randn(2, 64, 7, 6, device=device)
    assert layer.weight.shape == (128, 16, 3, 3)
    expected = F.conv2d(x, layer.weight, layer.bias, 1, 1, groups=4)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(("cin", "cout"), [(6, 8), (8, 6)])
def test_c027_channels_must_be_divisible_by_groups(cin: int, cout: int) -> None:
    with pytest.raises(ValueError, match=r"Conv2d: \w+_channels = 6 .* groups = 4"):
        Conv2d(cin, cout, 3, groups=4)


@pytest.mark.parametrize(("height", "width"), [(7, 9), (8, 5), (1, 2)])
def test_c028_stride_two_rounds_up(height: int, width: int) -> None:
    y = Conv2d(2, 2, 3, 2, 1)(torch.zeros(1, 2, height, width))
    assert y.shape[2:] == ((height - 1) // 2 + 1, (width - 1) // 2 + 1)


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_c029_gradients_equal_pytorch(groups: int, device: torch.device) -> None:
    layer = Conv2d(8, 8, 3, 2, 1, groups=groups, device=device)
    x = torch.randn(2, 8, 5, 6, device=device, requires_grad=True)
    weights = [x, *layer.parameters()]
    y = layer(x)
    g = torch.randn_like(y)
    expected = F.conv2d(x, layer.weight, layer.bias, 2, 1, groups=groups)
    torch.testing.assert_close(
        torch.autograd.grad(y, weights, g), torch.autograd.grad(expected, weights, g)
    )


@pytest.mark.parametrize("shape", [(2, 4, 5, 5), (3, 5, 5), (3,)])
def test_wrong_input_names_layer_and_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"Conv2d: expected .*\[B, 3, H, W\], found") as error:
        Conv2d(3, 4, 3)(torch.zeros(shape))
    assert str(list(shape)) in str(error.value)


def test_state_dict_is_that_of_pytorch() -> None:
    torch.nn.Conv2d(3, 4, 3).load_state_dict(Conv2d(3, 4, 3).state_dict())

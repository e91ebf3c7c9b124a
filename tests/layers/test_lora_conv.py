import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eri.errors import ConfigError
from eri.layers import Conv2d, LoRAConv2d
from eri.layers.backend import set_backend
from tests.kernel_checks import error, ops_on_cpu, ulp, where_ops_are


def test_c010_fields_and_shapes() -> None:
    layer = LoRAConv2d(6, 10, (3, 5), 4, stride=(2, 1), padding=(1, 2))
    assert all(isinstance(part, Conv2d) for part in (layer.base, layer.lora_a, layer.lora_b))
    assert layer.lora_a.weight.shape == (4, 6, 3, 5)
    assert layer.lora_b.weight.shape == (10, 4, 1, 1)
    assert (layer.lora_a.stride, layer.lora_a.padding) == ((2, 1), (1, 2))
    assert layer.lora_a.bias is None and layer.lora_b.bias is None
    assert layer(torch.zeros(2, 6, 7, 8)).shape == layer.base(torch.zeros(2, 6, 7, 8)).shape


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("rank", [1, 4])
def test_c014_output_is_the_convolution_with_the_changed_weight(
    groups: int, rank: int, device: torch.device
) -> None:
    layer = LoRAConv2d(6, 12, 3, rank, stride=2, padding=1, groups=groups, alpha=2, device=device)
    nn.init.normal_(layer.lora_b.weight)
    x = torch.randn(2, 6, 9, 8, device=device)
    weight = layer.base.weight + layer.delta()
    expected = F.conv2d(x, weight, layer.base.bias, 2, 1, groups=groups)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


def test_an_empty_batch_is_one() -> None:
    assert LoRAConv2d(6, 12, 3, 2, groups=2)(torch.zeros(0, 6, 5, 5)).shape == (0, 12, 3, 3)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    ],
    ids=["dilated", "same", "reflect"],
)
def test_other_convolutions_are_refused(conv: nn.Conv2d) -> None:
    with pytest.raises(ValueError, match="zero-padded convolution without dilation, found Conv2d"):
        LoRAConv2d.from_conv(conv, 2)


# ------------------------------------------------------------------------ 1×1, as a linear layer


def pointwise(**options: Any) -> LoRAConv2d:
    layer = LoRAConv2d(16, 24, 1, 4, **{"alpha": 8, **options})
    nn.init.normal_(layer.lora_b.weight)
    return layer


def pixels(*shape: int, **options: Any) -> Tensor:
    return torch.randn(shape, **options).contiguous(memory_format=torch.channels_last)


def with_gradients(layer: LoRAConv2d, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx, ΔA and ΔB."""
    x = x.detach().requires_grad_()
    y = layer(x)
    leaves = [x, layer.lora_a.weight, layer.lora_b.weight]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def is_fused(y: Tensor) -> bool:
    """Whether it is a view of what `lora_linear` made."""
    before = y.grad_fn.next_functions[0][0] if y.grad_fn is not None else None
    return before is not None and before.name() == "_LoRALinearBackward"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 16, 9, 7), (3, 16, 1, 1), (0, 16, 5, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_of_one_pixel_is_no_less_exact_than_eager(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype, device: torch.device
) -> None:
    layer = pointwise(bias=bias, device=device, dtype=dtype)
    x, dy = (pixels(shape[0], width, *shape[2:], device=device).to(dtype) for width in (16, 24))
    set_backend("reference")
    eager = with_gradients(layer, x, dy)
    truth = with_gradients(copy.deepcopy(layer).double(), x.double(), dy.double())
    with where_ops_are(device):
        y = layer(x)
        assert is_fused(y) and y.is_contiguous(memory_format=torch.channels_last)
        found = with_gradients(layer, x, dy)
    for one, other, exact in zip(found, eager, truth, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert error(one, exact) <= 2 * error(other, exact) + 4 * ulp(exact, one.dtype)


@pytest.mark.parametrize(
    "layer",
    [
        pointwise(stride=2),
        pointwise(padding=1),
        pointwise(groups=2),
        LoRAConv2d(16, 24, 3, 4),
        LoRAConv2d(16, 24, (1, 3), 4),
    ],
    ids=["stride", "padding", "groups", "3x3", "1x3"],
)
def test_other_convolutions_stay_what_they_are(layer: LoRAConv2d) -> None:
    x = pixels(2, 16, 6, 6)
    with ops_on_cpu():
        assert not is_fused(layer(x))
    assert not is_fused(pointwise()(x))


def test_maps_that_lie_channel_by_channel_stay_so(device: torch.device) -> None:
    layer, x = pointwise(device=device), torch.randn(2, 16, 6, 5, device=device)
    with where_ops_are(device):
        y = layer(x)
        assert not is_fused(y) and is_fused(layer(x.contiguous(memory_format=torch.channels_last)))
        with pytest.raises(ValueError, match=r"\[B, 16, H, W\]"):
            layer(pixels(2, 12, 6, 5, device=device))


def test_a_pointwise_convolution_that_the_kernels_cannot_run_is_refused() -> None:
    layer = LoRAConv2d(16, 22, 1, 4)
    with ops_on_cpu(), pytest.raises(ConfigError, match="lora_linear: it maps 16 numbers to 22"):
        layer(pixels(2, 16, 6, 5))

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eri.layers import Conv2d, LoRAConv2d


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

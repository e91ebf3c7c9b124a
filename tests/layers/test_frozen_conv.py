"""Frozen convolutions compute what PyTorch's do and keep nothing but their weight."""

import pytest
import torch
from torch import Tensor, nn

from eri.layers.frozen_conv import frozen_conv

CASES = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "stride 2": {"kernel_size": 3, "stride": 2, "padding": 1},
    "strides that leave a rest": {"kernel_size": (3, 2), "stride": (2, 3), "padding": (0, 1)},
    "1x1 stride 2": {"kernel_size": 1, "stride": 2},
    "wide": {"kernel_size": 5, "padding": 3},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def conv_of(case: str, bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Conv2d:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, bias=bias, dtype=dtype, **CASES[case])
    return conv.requires_grad_(False)


def map_of(dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 4, 7, 8, dtype=dtype)


def both(run, x: Tensor, dy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output and gradient of x."""
    x = x.detach().requires_grad_(True)
    y = run(x)
    y.backward(torch.cos(y.detach()) if dy is None else dy)
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradient_are_those_of_the_module(case: str, bias: bool) -> None:
    conv, x = conv_of(case, bias), map_of()
    torch.testing.assert_close(both(lambda x: frozen_conv(x, conv), x), both(conv, x))


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [4, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_card_adds_the_bias_as_pytorch_does(channels: int, layout: str) -> None:
    conv = nn.Conv2d(8, channels, 3, padding=1, device="cuda", dtype=torch.bfloat16)
    conv = conv.requires_grad_(False).to(memory_format=LAYOUTS[layout])
    x = torch.randn(2, 8, 16, 16, device="cuda").bfloat16().to(memory_format=LAYOUTS[layout])
    torch.testing.assert_close(both(lambda x: frozen_conv(x, conv), x), both(conv, x))


@pytest.mark.parametrize("case", ["3x3", "1x1", "strides that leave a rest"])
def test_the_gradient_is_the_slope(case: str) -> None:
    conv = conv_of(case)
    x = torch.randn(1, 4, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: frozen_conv(x, conv), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", LAYOUTS)
@pytest.mark.parametrize("maps", LAYOUTS)
@pytest.mark.parametrize("case", ["3x3", "1x1", "stride 2"])
def test_any_layout(
    device: torch.device, case: str, maps: str, weights: str, dtype: torch.dtype
) -> None:
    conv = conv_of(case, dtype=dtype).to(device, memory_format=LAYOUTS[weights])
    x = map_of(dtype).to(device).contiguous(memory_format=LAYOUTS[maps])
    mine, theirs = both(lambda x: frozen_conv(x, conv), x), both(conv, x)
    half = {"rtol": 0.016, "atol": 0.01} if dtype == torch.bfloat16 else {}  # sums round anywhere
    torch.testing.assert_close(mine, theirs, **half)
    assert mine[0].stride() == theirs[0].stride()


@pytest.mark.parametrize("case", ["3x3", "1x1", "stride 2"])
def test_a_gradient_that_is_not_contiguous(case: str) -> None:
    conv, x = conv_of(case), map_of()
    dy = torch.randn_like(conv(x).transpose(0, 3).contiguous()).transpose(0, 3)
    assert not dy.is_contiguous()
    assert not dy.is_contiguous(memory_format=torch.channels_last)
    run = lambda x: frozen_conv(x, conv)  # noqa: E731
    torch.testing.assert_close(both(run, x, dy), both(conv, x, dy))
    constant = torch.ones(()).double().expand_as(dy)  # what sum() sends back
    torch.testing.assert_close(both(run, x, constant), both(conv, x, constant))


def kept(run, x: Tensor) -> list[Tensor]:
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        run(x)
    return found


def test_nothing_is_kept_but_the_weight() -> None:
    conv = conv_of("3x3")
    x = map_of().requires_grad_(True)
    (weight,) = kept(lambda x: frozen_conv(x, conv), x)
    assert weight.data_ptr() == conv.weight.data_ptr()
    assert x.data_ptr() in {tensor.data_ptr() for tensor in kept(conv, x)}  # PyTorch's own does


def test_a_map_that_needs_no_gradient_gets_none() -> None:
    conv, x = conv_of("3x3"), map_of()
    y = frozen_conv(x, conv)
    assert not y.requires_grad
    assert torch.equal(y, conv(x))


def test_the_map_may_change_before_the_backward_pass() -> None:
    conv, x = conv_of("3x3"), map_of()
    want = both(conv, x)[1]
    leaf = x.clone().requires_grad_(True)
    copy = leaf.clone()
    y = frozen_conv(copy, conv)
    with torch.no_grad():
        copy.fill_(torch.nan)
    y.backward(torch.cos(y.detach()))
    torch.testing.assert_close(leaf.grad, want)


def test_a_second_derivative_is_refused() -> None:
    conv, x = conv_of("3x3"), map_of().requires_grad_(True)
    (slope,) = torch.autograd.grad(frozen_conv(x, conv).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()

import pytest
import torch
from torch import Tensor, nn

from eri.layers import GroupNorm, LayerNorm, MulRows, RMSNorm


def rms_norm(x: Tensor, weight: Tensor | float = 1.0, eps: float = 1e-6) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def test_c030_layer_norm_equals_pytorch(device: torch.device) -> None:
    x = torch.randn(2, 5, 768, device=device)
    expected = nn.LayerNorm([768], 1e-5, device=device)(x)
    torch.testing.assert_close(LayerNorm([768], 1e-5, device=device)(x), expected)
    torch.testing.assert_close(LayerNorm(768, device=device)(x), expected)


def test_c031_layer_norm_over_two_dimensions(device: torch.device) -> None:
    x = torch.randn(3, 16, 32, device=device)
    mean = x.mean((1, 2), keepdim=True)
    var = x.var((1, 2), correction=0, keepdim=True)
    expected = (x - mean) / (var + 1e-5).sqrt()
    torch.testing.assert_close(LayerNorm([16, 32], device=device)(x), expected)


def test_c032_layer_norm_weights() -> None:
    plain = LayerNorm.no_affine([768], 1e-5)
    assert plain.weight is None and plain.bias is None
    y = plain(3 + 2 * torch.randn(4, 768))
    torch.testing.assert_close(y.mean(-1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(-1, correction=0), torch.ones(4), atol=1e-4, rtol=0)
    affine = LayerNorm([768], 1e-5)
    assert torch.equal(affine.weight, torch.ones(768))
    assert torch.equal(affine.bias, torch.zeros(768))


@pytest.mark.parametrize("shape", [(2, 16, 31), (32,), ()])
def test_c033_layer_norm_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"LayerNorm: expected .*\[\.\.\., 16, 32\], found"):
        LayerNorm([16, 32])(torch.zeros(shape))


@pytest.mark.parametrize(("groups", "channels"), [(8, 64), (32, 256)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("positions", [(5, 7), (9,), ()])
def test_c034_group_norm_equals_pytorch(
    groups: int, channels: int, affine: bool, positions: tuple[int, ...], device: torch.device
) -> None:
    x = torch.randn(2, channels, *positions, device=device)
    layer = GroupNorm(groups, channels, 1e-5, affine, device=device)
    expected = nn.GroupNorm(groups, channels, 1e-5, affine, device=device)(x)
    torch.testing.assert_close(layer(x), expected)
    assert (layer.weight is not None) is affine


def test_c034_group_norm_weights_train() -> None:
    layer = GroupNorm(8, 64)
    assert torch.equal(layer.weight, torch.ones(64))
    assert torch.equal(layer.bias, torch.zeros(64))
    layer(torch.randn(2, 64, 3, 3)).square().sum().backward()
    for weight in (layer.weight, layer.bias):
        assert isinstance(weight, nn.Parameter)
        assert weight.grad is not None and weight.grad.any()


def test_c035_group_norm_channels_must_be_divisible() -> None:
    with pytest.raises(ValueError, match=r"GroupNorm: num_channels = 30 .* num_groups = 8"):
        GroupNorm(8, 30)
    with pytest.raises(ValueError, match=r"GroupNorm: expected .*\[B, 32, \.\.\.\], found \[2, 16"):
        GroupNorm(8, 32)(torch.zeros(2, 16, 4, 4))


def test_c036_group_norm_of_a_sample_ignores_its_batch_mates(device: torch.device) -> None:
    layer = GroupNorm(8, 64, device=device)
    x = torch.randn(4, 64, 5, 5, device=device)
    mates = torch.randn(3, 64, 5, 5, device=device) * 100
    torch.testing.assert_close(layer(torch.cat([x[:1], mates]))[:1], layer(x)[:1])


def test_c037_rms_norm_equals_its_formula(device: torch.device) -> None:
    layer = RMSNorm(4096, 1e-6, device=device)
    x = torch.randn(2, 3, 4096, device=device)
    torch.testing.assert_close(layer(x), rms_norm(x))
    assert layer.weight is not None
    nn.init.normal_(layer.weight)
    torch.testing.assert_close(layer(x), rms_norm(x, layer.weight))
    assert RMSNorm(8).eps == 1e-6


@pytest.mark.parametrize("leading", [(), (3,), (2, 3, 4), (0,)])
def test_c037_rms_norm_takes_any_leading_dimensions(
    leading: tuple[int, ...], device: torch.device
) -> None:
    x = torch.randn(*leading, 8, device=device)
    torch.testing.assert_close(RMSNorm(8, device=device)(x), rms_norm(x))


def test_c038_rms_norm_keeps_the_mean() -> None:
    x = torch.randn(2, 64)
    assert not torch.allclose(RMSNorm(64)(x + 3), RMSNorm(64)(x), atol=0.1)
    torch.testing.assert_close(LayerNorm(64)(x + 3), LayerNorm(64)(x))


@pytest.mark.gpu
def test_c038_rms_norm_is_not_slower_than_layer_norm() -> None:
    x = torch.randn(16384, 4096, device="cuda", dtype=torch.bfloat16)

    def milliseconds(layer: nn.Module) -> float:
        layer = layer.to(x)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        times = []
        with torch.no_grad():
            for _ in range(30):
                start.record()
                layer(x)
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
        return min(times)

    rms, layer = milliseconds(RMSNorm(4096)), milliseconds(LayerNorm(4096))
    print(f"RMSNorm {rms:.3f} ms, LayerNorm {layer:.3f} ms")  # docs/benchmarks.md; seen with -s
    assert rms <= 1.02 * layer


@pytest.mark.parametrize("layer", [LayerNorm(6), RMSNorm(6), GroupNorm(3, 6)], ids=repr)
def test_c039_permuted_input_gives_the_contiguous_result(
    layer: nn.Module, device: torch.device
) -> None:
    layer = layer.to(device)
    x = torch.randn(4, 6, 5, 6, device=device)
    results = []
    for layout in (x, x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        leaf = layout.detach().requires_grad_()
        y = layer(leaf)
        (gradient,) = torch.autograd.grad((y * x.cos()).sum(), leaf)
        results.append((y, gradient))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", [LayerNorm(64), RMSNorm(64), GroupNorm(4, 64)], ids=repr)
def test_c044_large_numbers_in_16_bits_stay_finite(
    layer: nn.Module, dtype: torch.dtype, device: torch.device
) -> None:
    x = (torch.rand(3, 64, device=device) * 2 - 1) * 6e4
    half = layer.to(device, dtype)(x.to(dtype))
    assert half.isfinite().all()
    expected = layer.to(device, torch.float64)(x.to(dtype).double())
    torch.testing.assert_close(half.double(), expected, atol=2e-2, rtol=2e-2)


GOLDEN_X = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
GOLDEN_Y = [[0.46291, 0.92582, 1.38873], [0.78954, 0.98693, 1.18431]]
GOLDEN_G = [[11.0, 12.0, 13.0], [14.0, 15.0, 16.0]]
GOLDEN_DX = [[2.64520, 0.66131, -1.32258], [0.43579, 0.05127, -0.33325]]


def test_c101_rms_norm_without_weight_has_the_golden_values(device: torch.device) -> None:
    layer = RMSNorm(elementwise_affine=False)
    assert list(layer.parameters()) == []
    assert layer.eps == 1e-5
    x = torch.tensor(GOLDEN_X, device=device, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y.cpu(), torch.tensor(GOLDEN_Y), atol=1e-5, rtol=0)
    y.backward(torch.tensor(GOLDEN_G, device=device))
    assert x.grad is not None
    torch.testing.assert_close(x.grad.cpu(), torch.tensor(GOLDEN_DX), atol=1e-5, rtol=0)


def test_c101_rms_norm_without_weight_then_mul_rows_is_rms_norm_with_one() -> None:
    whole, factor = RMSNorm(8, 1e-5), MulRows(8)
    assert whole.weight is not None
    nn.init.normal_(factor.weight)
    whole.load_state_dict(factor.state_dict())
    x = torch.randn(3, 8)
    torch.testing.assert_close(factor(RMSNorm(elementwise_affine=False)(x)), whole(x))


def test_rms_norm_refuses_other_widths() -> None:
    with pytest.raises(ValueError, match=r"RMSNorm: expected .*\[\.\.\., 8\], found \[2, 7\]"):
        RMSNorm(8)(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="needs hidden_size"):
        RMSNorm()


def test_state_dicts_are_those_of_pytorch() -> None:
    nn.LayerNorm(8).load_state_dict(LayerNorm(8).state_dict())
    nn.GroupNorm(2, 8).load_state_dict(GroupNorm(2, 8).state_dict())
    nn.RMSNorm(8).load_state_dict(RMSNorm(8).state_dict())

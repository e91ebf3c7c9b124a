import pytest
import torch
from torch import Tensor

from eri.layers import BatchNorm2d


def statistics(layer: BatchNorm2d) -> tuple[Tensor, Tensor, int]:
    assert layer.running_mean is not None and layer.running_var is not None
    assert layer.num_batches_tracked is not None
    return layer.running_mean, layer.running_var, int(layer.num_batches_tracked)


def normalised(x: Tensor, eps: float = 1e-5) -> Tensor:
    mean = x.mean((0, 2, 3), keepdim=True)
    return (x - mean) / (x.var((0, 2, 3), correction=0, keepdim=True) + eps).sqrt()


def test_c040_training_uses_and_tracks_the_batch(device: torch.device) -> None:
    layer = BatchNorm2d(3, 1e-5, 0.1, True, True, device=device)
    mean, var, count = statistics(layer)
    assert (mean.tolist(), var.tolist(), count) == ([0.0] * 3, [1.0] * 3, 0)
    x = 2 + 3 * torch.randn(4, 3, 5, 6, device=device)
    torch.testing.assert_close(layer(x), normalised(x))
    mean, var, count = statistics(layer)
    torch.testing.assert_close(mean, 0.1 * x.mean((0, 2, 3)))
    torch.testing.assert_close(var, 0.9 + 0.1 * x.var((0, 2, 3), correction=1))
    assert count == 1


def test_c040_golden_running_variance_is_the_unbiased_one() -> None:
    layer = BatchNorm2d(1)
    layer(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 2, 2))
    mean, var, _ = statistics(layer)
    assert mean.item() == pytest.approx(0.25)
    assert var.item() == pytest.approx(1.0667, abs=1e-4)


def test_c041_evaluation_uses_the_running_statistics() -> None:
    layer = BatchNorm2d(3)
    layer(2 + 3 * torch.randn(4, 3, 5, 5))
    layer.eval()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(2, 3, 4, 4)
    mean, var, _ = statistics(layer)
    expected = (x - mean.view(3, 1, 1)) / (var.view(3, 1, 1) + 1e-5).sqrt()
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(layer(x), layer(x))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_c042_without_tracking_evaluation_uses_the_batch() -> None:
    layer = BatchNorm2d(3, track_running_stats=False).eval()
    assert list(layer.buffers()) == []
    x = 2 + 3 * torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(layer(x), normalised(x))


def test_c043_affine_is_optional() -> None:
    layer = BatchNorm2d(3, affine=False)
    assert layer.weight is None and layer.bias is None
    assert all(weight.requires_grad for weight in BatchNorm2d(3).parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("module_dtype", [torch.float32, None], ids=["mixed", "same"])
def test_c044_large_numbers_in_16_bits_stay_finite(
    dtype: torch.dtype, module_dtype: torch.dtype | None, device: torch.device
) -> None:
    layer = BatchNorm2d(4, dtype=module_dtype or dtype, device=device)
    x = ((torch.rand(3, 4, 5, 5, device=device) * 2 - 1) * 6e4).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), normalised(x.float()), atol=2e-2, rtol=2e-2)
    assert all(value.isfinite().all() for value in layer.state_dict().values())
    assert layer.eval()(x).isfinite().all()


@pytest.mark.parametrize("shape", [(2, 4, 5, 5), (3, 5, 5)])
def test_wrong_input_names_layer_and_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"BatchNorm2d: expected .*\[B, 3, H, W\], found"):
        BatchNorm2d(3)(torch.zeros(shape))


def test_state_dict_is_that_of_pytorch() -> None:
    torch.nn.BatchNorm2d(3).load_state_dict(BatchNorm2d(3).state_dict())

import pytest
import torch
from torch import Tensor

from eri.layers import Dropout


def layers(p: float) -> list[Dropout]:
    return [Dropout(p), Dropout.with_seed(p, 42)]


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_c049_fraction_and_scale(p: float, seeded: bool, device: torch.device) -> None:
    n = 100_000
    x = torch.ones(n, device=device)
    y = layers(p)[seeded](x)
    dropped = (y == 0).float().mean().item()
    assert abs(dropped - p) < 4 * (p * (1 - p) / n) ** 0.5
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - p)))
    assert y.mean().item() == pytest.approx(1, abs=4 * (p / (1 - p) / n) ** 0.5)


@pytest.mark.parametrize("layer", layers(0.5), ids=repr)
def test_c049_every_call_draws_a_new_mask(layer: Dropout, device: torch.device) -> None:
    layer, x = layer.to(device), torch.ones(256, device=device)
    assert layer.training
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("layer", layers(0.5), ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_c049_shape_and_dtype_are_kept(
    layer: Dropout, dtype: torch.dtype, device: torch.device
) -> None:
    x = torch.ones(3, 4, 5, 2, dtype=dtype, device=device)
    y = layer.to(device)(x)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    assert set(y.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("layer", layers(0.3), ids=repr)
def test_c050_evaluation_returns_the_input(layer: Dropout) -> None:
    x = torch.randn(10)
    assert layer.eval()(x) is x


def test_c050_probability_is_zero_to_one() -> None:
    x = torch.randn(10)
    for none, everything in zip(layers(0.0), layers(1.0), strict=True):
        assert none(x) is x
        assert torch.equal(everything(x), torch.zeros(10))
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match=str(p)):
            Dropout(p)


def test_c051_equal_seeds_give_equal_sequences_of_different_masks(device: torch.device) -> None:
    x = torch.ones(256, device=device)
    first, second, other = (Dropout.with_seed(0.5, s).to(device) for s in (42, 42, 43))
    masks = [first(x) for _ in range(3)]
    assert all(torch.equal(mask, second(x)) for mask in masks)
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], other(x))
    assert torch.equal(masks[0].cpu(), Dropout(0.5, seed=42)(torch.ones(256)))


def test_c051_the_global_generator_is_neither_read_nor_moved() -> None:
    layer, again = Dropout.with_seed(0.5, 1), Dropout.with_seed(0.5, 1)
    x = torch.ones(64)
    before = torch.get_rng_state()
    y = layer(x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12345)
    assert torch.equal(again(x), y)


def test_d06_a_restored_layer_continues_its_sequence() -> None:
    x = torch.ones(64)
    layer = Dropout.with_seed(0.5, 1)
    layer(x)
    restored = Dropout.with_seed(0.5, 1)
    restored.load_state_dict(layer.state_dict())
    assert torch.equal(restored(x), layer(x))
    assert Dropout(0.5).state_dict() == {}


@pytest.mark.parametrize("n", [64, 256, 1024])
def test_c052_small_masks_are_unbiased_and_uncorrelated(n: int) -> None:
    p, calls = 0.1, 400
    for seed in (0, 1, 42):
        layer = Dropout.with_seed(p, seed)
        kept = torch.stack([layer(torch.ones(n)) for _ in range(calls)]) != 0
        rate = kept.float().mean().item()
        assert abs(rate - 0.9) < 4 * (p * (1 - p) / (n * calls)) ** 0.5
        centred: Tensor = kept.double() - 0.9
        successive = (centred[1:] * centred[:-1]).mean().item() / (p * (1 - p))
        neighbours = (centred[:, 1:] * centred[:, :-1]).mean().item() / (p * (1 - p))
        assert abs(successive) < 5 / (n * calls) ** 0.5
        assert abs(neighbours) < 5 / (n * calls) ** 0.5


@pytest.mark.parametrize("layer", layers(0.4), ids=repr)
def test_c053_gradient_is_the_scaled_mask(layer: Dropout, device: torch.device) -> None:
    x = torch.randn(1000, device=device, requires_grad=True)
    y = layer.to(device)(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y != 0) / 0.6)

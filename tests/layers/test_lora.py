from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eri.layers import Conv2d, Linear, LoRAConv2d, LoRALayer, LoRALinear


def linear(dtype: torch.dtype = torch.float32) -> tuple[LoRALayer, Tensor]:
    return LoRALinear(6, 10, 3, alpha=6, dtype=dtype), torch.randn(2, 5, 6, dtype=dtype)


def conv(dtype: torch.dtype = torch.float32) -> tuple[LoRALayer, Tensor]:
    layer = LoRAConv2d(6, 10, 3, 3, stride=2, padding=1, alpha=6, dtype=dtype)
    return layer, torch.randn(2, 6, 7, 5, dtype=dtype)


def grouped(dtype: torch.dtype = torch.float32) -> tuple[LoRALayer, Tensor]:
    layer = LoRAConv2d(6, 10, (3, 1), 3, padding=(1, 0), groups=2, alpha=6, dtype=dtype)
    return layer, torch.randn(2, 6, 7, 5, dtype=dtype)


every_layer = pytest.mark.parametrize("build", [linear, conv, grouped])


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_c012_a_fresh_layer_is_its_base_bit_for_bit(build, dtype, device: torch.device) -> None:
    layer, x = build(dtype)
    layer, x = layer.to(device), x.to(device)
    assert layer.lora_a.weight.count_nonzero() > 0
    assert layer.lora_b.weight.count_nonzero() == 0
    assert torch.equal(layer(x), layer.base(x))


@every_layer
def test_c012_a_is_uniform_within_one_over_sqrt_fan_in(build) -> None:
    layer, _ = build()
    a = layer.lora_a.weight
    bound = a[0].numel() ** -0.5
    assert 0.7 * bound < a.abs().max() <= bound


@every_layer
def test_c015_only_the_pair_trains(build) -> None:
    layer, x = build()
    names = {name for name, weight in layer.named_parameters() if weight.requires_grad}
    assert names == {"lora_a.weight", "lora_b.weight"}
    layer(x).sum().backward()
    assert all(weight.grad is None for weight in layer.base.parameters())


@every_layer
def test_c016_a_has_no_gradient_before_b_has_moved(build) -> None:
    layer, x = build()
    pair = [layer.lora_a.weight, layer.lora_b.weight]
    optimizer = torch.optim.SGD(pair, lr=0.1)
    layer(x).square().mean().backward()
    assert pair[0].grad is not None and pair[0].grad.count_nonzero() == 0
    assert pair[1].grad is not None and pair[1].grad.count_nonzero() > 0
    optimizer.step()
    optimizer.zero_grad()
    layer(x).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.count_nonzero() > 0 for weight in pair)


@every_layer
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)],
    ids=str,
)
def test_c017_merging_keeps_the_output_and_unmerging_the_weight(
    build, dtype, tolerance: float, device: torch.device
) -> None:
    layer, x = build(dtype)
    layer, x = layer.to(device), x.to(device)
    nn.init.normal_(layer.lora_b.weight)
    y, before = layer(x), layer.base.weight.clone()
    layer.merge()
    layer.merge()
    assert layer.merged
    assert layer.base.weight.dtype == dtype
    assert not torch.equal(layer.base.weight, before)
    assert (layer(x) - y).norm() <= tolerance * y.norm()
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(layer.base.weight, before)
    assert torch.equal(layer(x), y)


@every_layer
def test_c017_delta_is_the_change_of_the_weight(build) -> None:
    layer, _ = build()
    nn.init.normal_(layer.lora_b.weight)
    with torch.autocast("cpu", torch.bfloat16):
        delta = layer.delta()
    assert delta.dtype == torch.float32
    assert delta.shape == layer.base.weight.shape
    before = layer.base.weight.clone()
    layer.merge()
    torch.testing.assert_close(layer.base.weight - before, delta)


@every_layer
def test_c019_reference_gradients_equal_those_of_the_merged_weight(build) -> None:
    layer, x = build(torch.float64)
    nn.init.normal_(layer.lora_b.weight)
    x.requires_grad_()
    leaves = [x, layer.lora_a.weight, layer.lora_b.weight]
    weights = {"weight": layer.base.weight + layer.delta(), "bias": layer.base.bias}
    merged = torch.func.functional_call(layer.base, weights, x)
    torch.testing.assert_close(layer(x), merged)
    g = torch.randn_like(merged)
    expected = torch.autograd.grad(merged, leaves, g)
    torch.testing.assert_close(torch.autograd.grad(layer(x), leaves, g), expected)


@every_layer
def test_alpha_over_rank_scales_the_update(build) -> None:
    layer, x = build()
    nn.init.normal_(layer.lora_b.weight)
    assert (layer.alpha, layer.rank, layer.scale) == (6.0, 3, 2.0)
    update = layer(x) - layer.base(x)
    layer.scale = 1.0
    torch.testing.assert_close(update, 2 * (layer(x) - layer.base(x)), atol=1e-5, rtol=1e-4)


def test_dropout_acts_on_the_adapter_alone_and_in_training_alone() -> None:
    layer = LoRALinear(64, 64, 4, dropout=0.5)
    nn.init.normal_(layer.lora_b.weight)
    x = torch.randn(3, 64)
    assert not torch.equal(layer(x), layer(x))
    nn.init.zeros_(layer.lora_b.weight)
    assert torch.equal(layer(x), layer.base(x))
    nn.init.normal_(layer.lora_b.weight)
    layer.eval()
    torch.testing.assert_close(layer(x), layer.base(x) + x @ layer.delta().T)


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, None])
def test_c018_rank_is_a_positive_integer(rank) -> None:
    for build in (lambda: LoRALinear(4, 4, rank), lambda: LoRAConv2d(4, 4, 3, rank)):
        with pytest.raises(ValueError, match=f"rank must be a positive integer, found {rank}"):
            build()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_pair_is_float32_beside_a_base_of_16_bits(dtype: torch.dtype) -> None:
    for layer, x in (linear(dtype), conv(dtype)):
        assert layer.base.weight.dtype == dtype
        assert {layer.lora_a.weight.dtype, layer.lora_b.weight.dtype} == {torch.float32}
        y = layer(x)
        assert y.dtype == dtype
        y.float().sum().backward()
        assert layer.lora_b.weight.grad is not None
        assert layer.lora_b.weight.grad.dtype == torch.float32


@every_layer
def test_the_generator_alone_decides_what_a_is(build) -> None:
    base = build()[0].base
    wrap: Any = LoRALinear.from_linear if isinstance(base, Linear) else LoRAConv2d.from_conv
    before = torch.get_rng_state()
    draws = [
        wrap(base, 3, generator=torch.Generator().manual_seed(seed)).lora_a.weight
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("base", "wrap"),
    [(Linear(6, 10), LoRALinear.from_linear), (Conv2d(6, 10, 3), LoRAConv2d.from_conv)],
    ids=["linear", "conv"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_c020_wrapping_keeps_the_layer_itself(base, wrap, dtype) -> None:
    base = base.to(dtype)
    before = base.weight.clone()
    layer = wrap(base, 2, alpha=4, dropout=0.25)
    assert layer.base is base
    assert torch.equal(base.weight, before)
    assert not base.weight.requires_grad
    assert base.weight.dtype == dtype
    assert layer.lora_a.weight.dtype == torch.promote_types(dtype, torch.float32)
    assert (layer.scale, layer.dropout.p) == (2.0, 0.25)

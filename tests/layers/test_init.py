import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eri.layers import Conv, Conv2d, Embeddings, Linear, LoRALinear, SAMultiHead, init, materialize
from eri.layers.init import GAINS, KAIMING_NORMAL_RELU, XAVIER_NORMAL_LINEAR, Initializer


@pytest.mark.parametrize("gain", [1.0, 2.0])
@pytest.mark.parametrize(
    ("weight", "fans"),
    [(Linear(300, 200).weight, 500), (Conv2d(16, 32, 3).weight, (16 + 32) * 9)],
    ids=["linear", "conv"],
)
def test_c073_xavier_uniform_fills_its_bounds(weight: Tensor, fans: int, gain: float) -> None:
    bound = gain * math.sqrt(6 / fans)
    init.xavier_uniform(weight, gain)
    assert 0.99 * bound < weight.abs().max() <= bound * (1 + 1e-6)
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


@pytest.mark.parametrize("a", [0.0, 0.2])
@pytest.mark.parametrize(("mode", "fan"), [("fan_in", 32 * 9), ("fan_out", 64 * 9)])
def test_c074_kaiming_normal_has_its_deviation(a: float, mode, fan: int) -> None:
    weight = init.kaiming_normal(Conv2d(32, 64, 3).weight, a=a, mode=mode)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (1 + a * a) / fan), rel=0.03)


def test_c074_unknown_modes_and_missing_fans_are_refused() -> None:
    with pytest.raises(ValueError, match="fan_sideways"):
        init.kaiming_normal(torch.zeros(3, 3), mode="fan_sideways")  # type: ignore[arg-type]
    for fill in (init.kaiming_normal, init.xavier_uniform):
        with pytest.raises(ValueError, match="fewer than 2 dimensions"):
            fill(torch.zeros(3))


def test_c075_constant_and_normal() -> None:
    assert torch.equal(init.constant(torch.zeros(4), 0.5), torch.full((4,), 0.5))
    weight = init.normal(torch.zeros(200, 500), mean=0.3, std=0.02)
    assert weight.mean().item() == pytest.approx(0.3, abs=4 * 0.02 / 100_000**0.5)
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    with pytest.raises(ValueError, match=r"-0\.1"):
        init.normal(weight, std=-0.1)


@pytest.mark.parametrize(
    "fill",
    [init.xavier_uniform, init.kaiming_normal, init.normal, lambda t: init.constant(t, 1.0)],
    ids=["xavier_uniform", "kaiming_normal", "normal", "constant"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_c075_filling_is_in_place_and_leaves_the_rest_alone(
    fill: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    weight = torch.nn.Parameter(torch.zeros(8, 8, dtype=dtype, device=device))
    assert fill(weight) is weight
    assert (weight.dtype, weight.device.type, weight.requires_grad) == (dtype, device.type, True)
    assert weight.grad_fn is None
    assert weight.count_nonzero() > 0


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Linear(6, 4), (2, 6)),
        (Linear.lazy(4), (2, 6)),
        (Conv2d(6, 4, 3), (2, 6, 5, 5)),
        (Conv(3, 4), (6, 5, 5)),
        (Embeddings(6, 4), (2, 1)),
        (LoRALinear(6, 4, 2), (2, 6)),
        (SAMultiHead(4, 2, 2, 8), (5, 4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a130_each_function_fills_the_weights_of_a_layer(layer, shape: tuple[int, ...]) -> None:
    materialize(layer, torch.zeros(shape))
    weights = [weight for weight in layer.parameters() if weight.dim() > 1]
    for fill in (init.xavier_uniform, init.kaiming_normal, init.normal):
        before = [weight.clone() for weight in weights]
        changed = [not torch.equal(fill(w), b) for w, b in zip(weights, before, strict=True)]
        assert changed and all(changed)


@pytest.mark.parametrize(
    ("initializer", "expected"),
    [
        (Initializer("xavier", "normal", GAINS["linear"]), math.sqrt(2 / 192)),
        (Initializer("xavier", "uniform", GAINS["tanh"]), 5 / 3 * math.sqrt(6 / 192)),
        (Initializer("kaiming", "normal", GAINS["relu"]), 0.25),
        (Initializer("kaiming", "uniform", GAINS["sigmoid"]), math.sqrt(6 / 64)),
        (Initializer("fixed", "uniform", 0.07), 0.07),
        (Initializer("fixed", "normal", 0.07), 0.07),
    ],
)
def test_c091_get_norm_k_of_the_table(initializer: Initializer, expected: float) -> None:
    assert initializer.get_norm_k(64, 128) == pytest.approx(expected)


def test_c091_defaults() -> None:
    assert Initializer("xavier", "normal", 1.0) == XAVIER_NORMAL_LINEAR
    assert Initializer("kaiming", "normal", math.sqrt(2)) == KAIMING_NORMAL_RELU


def test_c091_a_normal_exceeds_k_and_a_uniform_never_does() -> None:
    normal = Initializer("fixed", "normal", 0.1).fill(torch.zeros(10_000), 1, 1)
    uniform = Initializer("fixed", "uniform", 0.1).fill(torch.zeros(10_000), 1, 1)
    assert normal.abs().max() > 0.2
    assert normal.std().item() == pytest.approx(0.1, rel=0.03)
    assert 0.099 < uniform.abs().max() <= 0.1

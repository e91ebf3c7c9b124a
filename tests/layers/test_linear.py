import copy

import pytest
import torch
import torch.nn.functional as F

from eri.layers import Linear, materialize
from eri.layers.init import Initializer


def test_c003_equals_pytorch(device: torch.device) -> None:
    layer = Linear(768, 1024, device=device)
    x = torch.randn(2, 77, 768, device=device)
    y = layer(x)
    assert y.shape == (2, 77, 1024)
    torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3, 4), (0,), (2, 0)])
def test_c004_any_leading_dimensions(leading: tuple[int, ...], device: torch.device) -> None:
    layer = Linear(5, 7, device=device)
    x = torch.randn(*leading, 5, device=device)
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)


def test_c005_bias_is_optional() -> None:
    assert Linear(768, 1024, bias=False).bias is None
    assert Linear(768, 1024, bias=True).bias.shape == (1024,)
    assert Linear(768, 1024).bias is not None


def test_c006_weight_is_out_by_in() -> None:
    assert Linear(768, 1024).weight.shape == (1024, 768)


def test_c007_widths_are_plain_integers() -> None:
    layer = Linear(768, 1024)
    assert (layer.in_features, layer.out_features) == (768, 1024)
    assert type(layer.in_features) is int


@pytest.mark.parametrize("shape", [(2, 77, 767), (1,), ()])
def test_c008_wrong_width_names_layer_and_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"Linear: expected .*\[\.\.\., 768\], found") as error:
        Linear(768, 1024)(torch.zeros(shape))
    assert str(list(shape)) in str(error.value)


def test_c009_initial_weights_are_uniform_within_one_over_sqrt_in() -> None:
    weight = Linear(768, 1024).weight
    bound = 768**-0.5
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_state_dict_is_that_of_pytorch() -> None:
    torch.nn.Linear(3, 4).load_state_dict(Linear(3, 4).state_dict())


def test_c097_lazy_is_x_times_w_plus_b() -> None:
    layer = Linear.lazy(4, bias=True)
    x = torch.randn(3, 2, 5)  # D, H, W: the weight is shared over D
    y = layer(x)
    w, b = layer.provider_views()
    assert w is not None and w.shape == (5, 4)
    assert b is not None and torch.equal(b, torch.zeros(4))
    torch.testing.assert_close(y, x @ w + b)
    assert type(layer) is Linear
    with pytest.raises(ValueError, match=r"found \[2, 6\]"):
        layer(torch.zeros(2, 6))


def test_c097_lazy_has_no_bias_unless_asked() -> None:
    layer = Linear.lazy(4)
    layer(torch.zeros(1, 3))
    assert layer.bias is None


def test_c086_lazy_weights_are_made_once() -> None:
    layer = Linear.lazy(4)
    x = torch.randn(2, 3)
    first = materialize(layer, x)
    before = copy.deepcopy(layer.state_dict())
    torch.testing.assert_close(materialize(layer, x), first)
    torch.testing.assert_close(layer.state_dict(), before)


def test_c086_loaded_weights_are_not_made_again() -> None:
    source = Linear.lazy(4, bias=True)
    source(torch.randn(2, 3))
    target = Linear.lazy(4, bias=True)
    target.load_state_dict(source.state_dict())
    x = torch.randn(5, 3)
    assert torch.equal(target(x), source(x))
    assert target.in_features == 3


def test_c087_for_update_is_weight_then_bias() -> None:
    layer = Linear(3, 4)
    weight, bias = layer.for_update()
    assert weight is layer.weight
    assert bias is layer.bias
    assert len(Linear(3, 4, bias=False).for_update()) == 1
    with pytest.raises(RuntimeError, match="do not exist yet"):
        Linear.lazy(4).for_update()


def test_c088_provider_fills_w_as_in_by_out_and_b() -> None:
    def provide(w: torch.Tensor, b: torch.Tensor | None) -> None:
        assert b is not None
        w.copy_(torch.arange(6.0).view(3, 2))
        b.fill_(1.0)

    layer = Linear.lazy(2, bias=True, provide_weights=provide)
    with pytest.raises(RuntimeError, match="do not exist yet"):
        layer.load_from_provider()
    layer(torch.zeros(1, 3))
    layer.load_from_provider()
    assert layer(torch.eye(3)).tolist() == [[1, 2], [3, 4], [5, 6]]


def test_c088_without_a_provider_nothing_happens() -> None:
    layer = Linear(3, 4)
    before = copy.deepcopy(layer.state_dict())
    layer.load_from_provider()
    torch.testing.assert_close(layer.state_dict(), before)


def test_c091_lazy_takes_an_initializer_and_defaults_to_xavier_normal() -> None:
    fixed = Linear.lazy(64, init_weights=Initializer("fixed", "uniform", 0.5))
    fixed(torch.zeros(1, 256))
    assert 0.49 < fixed.weight.abs().max() <= 0.5
    layer = Linear.lazy(256)
    layer(torch.zeros(1, 512))
    assert layer.weight.std().item() == pytest.approx((2 / 768) ** 0.5, rel=0.02)

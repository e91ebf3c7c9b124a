import copy
from typing import Any

import pytest
import torch
from torch import nn

from eri.layers import (
    Conv,
    Dropout,
    Embeddings,
    Layers,
    Linear,
    LinearWithWeights,
    MulRows,
    Residual,
    SAMultiHead,
    SwiGLU,
    materialize,
)
from eri.layers.weights import OwnsWeights

# layer, input, shapes of for_update, shapes that the provider sees
CASES: dict[str, tuple[Any, tuple[int, ...], list, list]] = {
    "linear": (
        lambda p: Linear.lazy(4, True, provide_weights=p),
        (2, 3),
        [(4, 3), (4,)],
        [(3, 4), (4,)],
    ),
    "linear-no-bias": (
        lambda p: Linear.lazy(4, provide_weights=p),
        (2, 3),
        [(4, 3)],
        [(3, 4), None],
    ),
    "conv": (
        lambda p: Conv(3, 4, batch_size=2, provide_weights=p),
        (6, 5, 5),
        [(4, 3, 3, 3), (4,)],
        [(12, 3, 3)],
    ),
    "embeddings": (lambda p: Embeddings(9, 4, provide_weights=p), (2, 3), [(9, 4)], [(9, 4)]),
    "mul-rows": (lambda p: MulRows(4, provide_weights=p), (2, 4), [(4,)], [(4,)]),
    "swiglu": (
        lambda p: SwiGLU(5, 7, provide_weights=p),
        (2, 3),
        [(7, 3), (7, 3), (5, 7)],
        [(3, 7), (3, 7), (7, 5)],
    ),
    "sa-multihead": (
        lambda p: SAMultiHead(8, 4, 2, 6, provide_weights=p),
        (6, 8),
        [(8, 8)] * 3,
        [(8, 8)] * 3,
    ),
}
every_layer = pytest.mark.parametrize(
    ("build", "shape", "updated", "provided"), CASES.values(), ids=CASES.keys()
)


@every_layer
def test_c087_for_update_lists_the_weights_in_order(build, shape, updated, provided) -> None:
    layer = build(None)
    materialize(layer, torch.zeros(shape))
    weights = layer.for_update()
    assert [tuple(weight.shape) for weight in weights] == updated
    assert all(isinstance(weight, nn.Parameter) for weight in weights)


@every_layer
def test_c088_the_provider_fills_the_weights_in_order(build, shape, updated, provided) -> None:
    seen = []

    def provide(*weights: torch.Tensor | None) -> None:
        for number, weight in enumerate(weights, start=1):
            seen.append(None if weight is None else tuple(weight.shape))
            if weight is not None:
                weight.fill_(number)

    layer = build(provide)
    materialize(layer, torch.zeros(shape))
    layer.load_from_provider()
    assert seen == provided
    filled = layer.for_update()[: len([s for s in provided if s])]
    assert [weight.unique().tolist() for weight in filled] == [
        [n + 1.0] for n in range(len(filled))
    ]


@every_layer
def test_c088_a_missing_provider_is_no_error(build, shape, updated, provided) -> None:
    layer = build(None)
    materialize(layer, torch.zeros(shape))
    before = copy.deepcopy(layer.state_dict())
    layer.load_from_provider()
    torch.testing.assert_close(layer.state_dict(), before)


@pytest.mark.parametrize(
    "build", [lambda: Linear.lazy(4), lambda: Conv(3, 4), lambda: SwiGLU(3, 4)]
)
def test_c087_before_the_first_input_there_is_nothing_to_list(build) -> None:
    layer: OwnsWeights = build()
    for ask in (layer.for_update, layer.provider_views):
        with pytest.raises(RuntimeError, match=r"weights do not exist yet; run the layer"):
            ask()


def test_c086_materialize_leaves_modes_dropout_and_weights_alone() -> None:
    dropout = Dropout.with_seed(0.5, 3)
    layers = Layers(
        Linear.lazy(4), dropout.eval(), Residual(SwiGLU(4, 8), Dropout.with_seed(0.5, 4))
    )
    modes = [part.training for part in layers.modules()]
    y = materialize(layers, torch.ones(2, 3))
    assert [part.training for part in layers.modules()] == modes
    assert not y.requires_grad
    torch.testing.assert_close(materialize(layers, torch.ones(2, 3)), y)
    assert dropout.calls is not None and dropout.calls == 0


def test_c087_shared_and_frozen_weights_and_layers_without_any() -> None:
    table = Embeddings(9, 4)
    frozen = MulRows(4).requires_grad_(False)
    norm = nn.LayerNorm(4)
    layers = Layers(
        table,
        Layers(frozen, norm),
        LinearWithWeights(table.weight, transposed=True),
        table,
    )
    weights = layers.for_update()
    assert [id(w) for w in weights] == [id(w) for w in (table.weight, norm.weight, norm.bias)]
    torch.optim.AdamW(weights)


def test_c088_layers_ask_every_provider_in_order() -> None:
    order = []
    layers = Layers(
        MulRows(4, provide_weights=lambda w: order.append("first")),
        nn.ReLU(),
        Residual(MulRows(4, provide_weights=lambda w: order.append("second"))),
        MulRows(4),
    )
    layers.load_from_provider()
    assert order == ["first", "second"]

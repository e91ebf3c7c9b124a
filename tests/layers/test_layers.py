import pytest
import torch
import torch.nn.functional as F

from eri.layers import (
    Conv,
    Dropout,
    Embeddings,
    Layers,
    Linear,
    LinearWithWeights,
    MulRows,
    NewReLu,
    ReLU,
    Reshape,
    Residual,
    RMSNorm,
    SAMultiHead,
    SwiGLU,
    materialize,
)


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("activation", NewReLu),
        ("packed_conv", Conv),
        ("dropout", Dropout),
        ("embeddings", Embeddings),
        ("linear", Linear),
        ("linear_with_weights", LinearWithWeights),
        ("mul_rows", MulRows),
        ("reshape", Reshape),
        ("norm", RMSNorm),
        ("residual", Residual),
        ("swiglu", SwiGLU),
        ("sa_multihead", SAMultiHead),
        ("layers", Layers),
    ],
)
def test_b53_each_file_of_the_document_has_its_module(module: str, layer: type) -> None:
    assert layer.__module__ == f"eri.layers.{module}"


def test_c107_runs_in_order() -> None:
    first, second = MulRows(3), ReLU()
    torch.nn.init.constant_(first.weight, -2)
    x = torch.randn(2, 3)
    layers = Layers(first, second)
    assert torch.equal(layers(x), second(first(x)))
    outputs, output = layers.forward_all(x)
    assert [y.tolist() for y in outputs] == [first(x).tolist(), second(first(x)).tolist()]
    assert torch.equal(output, layers(x))


def test_c107_empty_layers_are_the_identity() -> None:
    x = torch.randn(2, 3)
    assert Layers()(x) is x
    assert Layers().forward_all(x) == ([], x)
    assert Layers().for_update() == []


def small_transformer(vocab: int, width: int, context: int) -> Layers:
    table = Embeddings(vocab, width)
    blocks = []
    for _ in range(2):
        attention = SAMultiHead(width, width // 4, 4, context)
        blocks += [
            Residual(
                RMSNorm(elementwise_affine=False),
                MulRows(width),
                attention,
                Linear.lazy(width),
                Dropout(0.01),
            ),
            Residual(
                RMSNorm(elementwise_affine=False),
                MulRows(width),
                SwiGLU(width, 2 * width),
                Dropout(0.01),
            ),
        ]
    head = LinearWithWeights(table.weight, transposed=True)
    return Layers(table, *blocks, RMSNorm(elementwise_affine=False), MulRows(width), head)


def test_c108_a_small_transformer_learns_a_text_by_heart(device: torch.device) -> None:
    text = "the quick brown fox jumps over the lazy dog and runs away"
    letters = sorted(set(text))
    tokens = torch.tensor([[float(letters.index(c)) for c in text]], device=device)
    inputs, targets = tokens[:, :-1], tokens[0, 1:].long()
    model = small_transformer(len(letters), 32, inputs.shape[1]).to(device)
    materialize(model, inputs)
    weights = model.for_update()
    assert len(weights) == 1 + 2 * (1 + 3 + 1 + 1 + 3) + 1
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs)[0], targets).backward()
        optimizer.step()
    assert F.cross_entropy(model(inputs)[0], targets) < 0.1
    predicted = model.eval()(inputs)[0].argmax(-1)
    assert torch.equal(predicted, targets)

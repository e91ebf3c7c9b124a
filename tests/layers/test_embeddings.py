import pytest
import torch
from torch import nn

from eri.layers import Embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.int32], ids=str)
def test_c095_tokens_are_floats_or_integers(dtype: torch.dtype, device: torch.device) -> None:
    layer = Embeddings(10, 4, device=device)
    tokens = torch.tensor([[1, 2, 9], [0, 1, 1]], device=device)
    y = layer(tokens.to(dtype))
    assert y.shape == (2, 3, 4)
    assert torch.equal(y, layer.weight[tokens])


def test_c095_other_tokens_are_refused(device: torch.device) -> None:
    layer = Embeddings(10, 4, device=device)
    with pytest.raises(ValueError, match=r"expected integer tokens, found 2\.5"):
        layer(torch.tensor([1.0, 2.5], device=device))
    with pytest.raises(ValueError, match="found nan"):
        layer(torch.tensor([float("nan")], device=device))
    for tokens in ([1.0, 10.0], [-1.0, 3.0], [float("inf")]):
        with pytest.raises(IndexError, match=r"expected tokens in \[0, 10\)"):
            layer(torch.tensor(tokens, device=device))
    with pytest.raises(IndexError, match="found 3 to 10"):
        layer(torch.tensor([3, 10], device=device))
    assert layer(torch.zeros(0, 3, device=device)).shape == (0, 3, 4)


def test_c096_repeated_tokens_add_up(device: torch.device) -> None:
    torch.manual_seed(1)
    tokens = torch.randint(0, 5, (4, 50), device=device)
    g = torch.randn(4, 50, 8, device=device)
    layer = Embeddings(5, 8, device=device)
    expected = torch.zeros(5, 8, dtype=torch.float64)
    for token, row in zip(tokens.flatten().tolist(), g.view(-1, 8).cpu().double(), strict=True):
        expected[token] += row
    for _ in range(100):
        (gradient,) = torch.autograd.grad(layer(tokens), layer.weight, g)
        torch.testing.assert_close(gradient.cpu().double(), expected, atol=1e-5, rtol=1e-5)


def test_c095_a_given_table_is_the_weight() -> None:
    table = torch.randn(7, 3)
    layer = Embeddings(table)
    assert layer.weight.data_ptr() == table.data_ptr()
    assert layer.weight.requires_grad
    parameter = nn.Parameter(table)
    assert Embeddings(parameter).weight is parameter
    with pytest.raises(ValueError, match=r"found shape \[7\]"):
        Embeddings(table[:, 0])
    with pytest.raises(ValueError, match="features = 3"):
        Embeddings(table, 3)
    with pytest.raises(ValueError, match="needs features"):
        Embeddings(7)

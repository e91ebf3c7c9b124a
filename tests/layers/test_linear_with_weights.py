import copy

import pytest
import torch

from eri.layers import Embeddings, LinearWithWeights


def test_c098_multiplies_by_the_given_weight_without_owning_it(device: torch.device) -> None:
    weight = torch.randn(3, 5, device=device, requires_grad=True)
    layer = LinearWithWeights(weight)
    assert list(layer.parameters()) == []
    assert layer.state_dict() == {}
    assert not hasattr(layer, "for_update")
    x = torch.randn(2, 4, 3, device=device)
    y = layer(x)
    torch.testing.assert_close(y, x @ weight)
    y.sum().backward()
    torch.testing.assert_close(weight.grad, x.sum((0, 1))[:, None].expand(3, 5))


def test_c098_a_parameter_is_not_adopted() -> None:
    assert list(LinearWithWeights(torch.nn.Parameter(torch.zeros(2, 3))).parameters()) == []


@pytest.mark.parametrize("transposed", [False, True])
def test_c098_a_head_tied_to_the_embeddings_trains_the_table(transposed: bool) -> None:
    table = Embeddings(6, 4)
    weight = table.weight if transposed else table.weight.T
    head = LinearWithWeights(weight, transposed=transposed)
    x = torch.randn(3, 4)
    head(x).square().sum().backward()
    expected = 2 * (x @ table.weight.T).T @ x
    torch.testing.assert_close(table.weight.grad, expected)


def test_a_transposed_tie_survives_moves_and_copies() -> None:
    table = Embeddings(6, 4)
    model = torch.nn.ModuleList([table, LinearWithWeights(table.weight, transposed=True)])
    model.double()
    assert model[1](torch.zeros(2, 4, dtype=torch.float64)).dtype == torch.float64
    twin = copy.deepcopy(model)
    assert twin[1].weight is twin[0].weight


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[in, out\] for the weight, found \[3\]"):
        LinearWithWeights(torch.zeros(3))
    with pytest.raises(ValueError, match=r"\[\.\.\., 3\], found \[2, 5\]"):
        LinearWithWeights(torch.zeros(3, 5))(torch.zeros(2, 5))

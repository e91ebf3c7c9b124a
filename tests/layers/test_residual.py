import pytest
import torch
from torch import Tensor, nn

from eri.layers import Layers, MulRows, ReLU, Residual


class Constant(nn.Module):
    """Gives a tensor whatever comes in."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value


def test_c102_adds_the_chain_to_its_input(device: torch.device) -> None:
    x = torch.randn(2, 3, 4, device=device)
    chain = [MulRows(4, device=device), ReLU()]
    torch.testing.assert_close(Residual(*chain)(x), x + x.relu())
    torch.testing.assert_close(Residual(Layers(*chain))(x), x + x.relu())
    assert torch.equal(Residual()(x), 2 * x)


@pytest.mark.parametrize("shape", [(4,), (1, 4), (1, 1, 4)])
def test_c102_one_row_of_the_same_width_is_added_to_every_row(shape: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 4)
    row = torch.randn(shape)
    torch.testing.assert_close(Residual(Constant(row))(x), x + row.view(4))


def test_c102_a_row_does_not_change_the_shape_of_the_input() -> None:
    assert Residual(Constant(torch.zeros(1, 1, 4)))(torch.zeros(3, 4)).shape == (3, 4)


@pytest.mark.parametrize("shape", [(2, 3, 1), (1,), (3, 4), (2, 1, 4), (2, 3, 5), ()])
def test_c102_nothing_else_is_broadcast(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"Residual: expected .*\[2, 3, 4\]") as error:
        Residual(Constant(torch.zeros(shape)))(torch.zeros(2, 3, 4))
    assert f"found {list(shape)}" in str(error.value)

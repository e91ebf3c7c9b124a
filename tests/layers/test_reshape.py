import pytest
import torch

from eri.layers import Reshape


def test_c100_shares_storage_and_passes_gradients(device: torch.device) -> None:
    x = torch.arange(12.0, device=device, requires_grad=True)
    y = Reshape(3, 2, 2)(x)
    assert y.shape == (2, 2, 3)
    assert y.data_ptr() == x.data_ptr()
    assert y[1, 0, 2] == 8
    g = torch.randn(2, 2, 3, device=device)
    y.backward(g)
    assert x.grad is not None and torch.equal(x.grad, g.flatten())


def test_c100_missing_sizes_are_one() -> None:
    assert Reshape(6)(torch.zeros(2, 3)).shape == (1, 1, 6)


def test_c100_another_number_of_elements_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Reshape: .*with 12 elements, found \[13\]"):
        Reshape(3, 2, 2)(torch.zeros(13))


def test_a_transposed_input_keeps_its_own_order() -> None:
    x = torch.arange(6).view(2, 3).T
    assert Reshape(6)(x).flatten().tolist() == [0, 3, 1, 4, 2, 5]

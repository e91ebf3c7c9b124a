import pytest
import torch

from eri.layers import MulRows


def test_c099_starts_as_the_identity() -> None:
    layer = MulRows(5)
    assert torch.equal(layer.weight, torch.ones(5))
    x = torch.randn(2, 3, 5)
    assert torch.equal(layer(x), x)


def test_c099_gradient_sums_over_rows(device: torch.device) -> None:
    layer = MulRows(5, device=device)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, 3, 5, device=device)
    g = torch.randn(2, 3, 5, device=device)
    y = layer(x)
    torch.testing.assert_close(y[1, 2], x[1, 2] * layer.weight)
    y.backward(g)
    torch.testing.assert_close(layer.weight.grad, (x * g).sum((0, 1)))


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"MulRows: expected .*\[\.\.\., 5\], found \[2, 1\]"):
        MulRows(5)(torch.zeros(2, 1))

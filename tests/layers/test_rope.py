import pytest
import torch

from eri.layers import apply_rope


def test_c104_golden_pair(device: torch.device) -> None:
    x = torch.zeros(2, 2, device=device)
    x[1] = torch.tensor([2.0, 5.0])
    y = apply_rope(x).cpu()
    torch.testing.assert_close(y[1], torch.tensor([-3.12675, 4.38445]), atol=1e-5, rtol=0)
    assert torch.equal(y[0], torch.zeros(2))


def test_c104_neighbours_make_pairs_with_falling_frequencies() -> None:
    x = torch.zeros(11, 4)
    x[10] = torch.tensor([1.0, 0.0, 1.0, 0.0])
    angles = torch.tensor([10.0, 10 * 10000**-0.5])
    expected = torch.stack((angles.cos(), angles.sin()), -1).flatten()
    torch.testing.assert_close(apply_rope(x)[10], expected)


def test_c104_lengths_are_kept(device: torch.device) -> None:
    x = torch.randn(2, 3, 50, 8, device=device)
    torch.testing.assert_close(apply_rope(x).norm(dim=-1), x.norm(dim=-1))


def test_c104_products_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 8, dtype=torch.float64)
    rotated_q, rotated_k = apply_rope(q.expand(40, 8)), apply_rope(k.expand(40, 8))
    products = rotated_q @ rotated_k.T
    for distance in (-7, 0, 3):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_c104_the_gradient_is_the_inverse_rotation() -> None:
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    y = apply_rope(x)
    (gradient,) = torch.autograd.grad(y, x, y.detach())
    torch.testing.assert_close(gradient, x.detach())


def test_c104_an_odd_head_size_is_refused() -> None:
    with pytest.raises(ValueError, match="even head size, found 5"):
        apply_rope(torch.zeros(3, 5))


def test_angles_stay_exact_in_16_bits() -> None:
    x = torch.randn(2000, 8)
    y = apply_rope(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), apply_rope(x.bfloat16().float()), atol=0.02, rtol=0.01)

import pytest
import torch
from torch import Tensor

from eri.layers import SAMultiHead
from eri.layers.rope import apply_rope


def reference(layer: SAMultiHead, x: Tensor) -> Tensor:
    """Head by head and row by row."""
    out = torch.zeros_like(x)
    size = layer.features_count // layer.heads_count
    for b in range(x.shape[0]):
        for h in range(layer.heads_count):
            features = slice(h * size, (h + 1) * size)
            q = apply_rope(x[b] @ layer.q.weight.T[:, features])
            k = apply_rope(x[b] @ layer.k.weight.T[:, features])
            v = x[b] @ layer.v.weight.T[:, features]
            for t in range(x.shape[1]):
                weights = (k[: t + 1] @ q[t] / size**0.5).softmax(0)
                out[b, t, features] = weights @ v[: t + 1]
    return out


def test_c105_equals_the_walk_over_heads_and_rows(device: torch.device) -> None:
    layer = SAMultiHead(8, 4, 2, 6, device=device)
    x = torch.randn(2, 6, 8, device=device)
    y = layer(x)
    torch.testing.assert_close(y, reference(layer, x))
    torch.testing.assert_close(layer(x[0]), y[0])


def test_c105_three_square_weights_and_nothing_else() -> None:
    state = SAMultiHead(8, 4, 2, 6).state_dict()
    assert {name: tuple(weight.shape) for name, weight in state.items()} == {
        "q.weight": (8, 8),
        "k.weight": (8, 8),
        "v.weight": (8, 8),
    }


def test_c105_the_past_does_not_see_the_future() -> None:
    layer = SAMultiHead(8, 4, 2, 6)
    x = torch.randn(1, 6, 8)
    later = x.clone()
    later[:, 4:] = 100
    torch.testing.assert_close(layer(later)[:, :4], layer(x)[:, :4])


def test_c105_sizes_must_fit() -> None:
    with pytest.raises(ValueError, match=r"= 3 · 4 is not features_count = 8"):
        SAMultiHead(8, 4, 3, 6)
    with pytest.raises(ValueError, match="head_size must be even for RoPE, found 3"):
        SAMultiHead(6, 3, 2, 6)
    layer = SAMultiHead(8, 4, 2, 6)
    for shape in ((1, 7, 8), (1, 6, 7), (8,)):
        with pytest.raises(ValueError, match=r"SAMultiHead: expected .*T ≤ 6, 8\], found"):
            layer(torch.zeros(shape))


def test_c106_huge_scores_do_not_leak_the_future(device: torch.device) -> None:
    layer = SAMultiHead(4, 2, 2, 6, device=device)
    with torch.no_grad():
        layer.q.weight.copy_(-1e3 * torch.eye(4))
        layer.k.weight.copy_(1e3 * torch.eye(4))
        layer.v.weight.copy_(torch.eye(4))
    x = torch.ones(1, 6, 4, device=device)  # every score is about -1e6
    y = layer(x)
    assert y.isfinite().all()
    later = x.clone()
    later[:, 3:] = 7
    torch.testing.assert_close(layer(later)[:, :3], y[:, :3])


def test_d15_initial_weights_depend_on_the_width_alone() -> None:
    weight = SAMultiHead(256, 64, 4, 6).q.weight
    assert weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)

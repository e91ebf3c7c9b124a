import pytest
import torch

from eri.layers import shape_to_whd, whd_to_shape


def test_c085_sizes_and_shapes_are_each_others_reverse() -> None:
    assert whd_to_shape(3, 2, 1) == (1, 2, 3)
    assert shape_to_whd((1, 2, 3)) == (3, 2, 1)
    assert shape_to_whd(whd_to_shape(5, 7, 11)) == (5, 7, 11)


def test_c085_missing_sizes_are_one() -> None:
    assert whd_to_shape(4) == (1, 1, 4)
    assert shape_to_whd((4,)) == (4, 1, 1)
    assert shape_to_whd((2, 4)) == (4, 2, 1)
    assert shape_to_whd(()) == (1, 1, 1)


def test_c085_w_runs_fastest() -> None:
    w, h, d = 3, 2, 2
    buffer = torch.arange(w * h * d)
    tensor = buffer.view(whd_to_shape(w, h, d))
    for z in range(d):
        for y in range(h):
            for x in range(w):
                assert tensor[z, y, x] == z * h * w + y * w + x


def test_c085_more_than_three_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, 2, 3, 4\]"):
        shape_to_whd((1, 2, 3, 4))

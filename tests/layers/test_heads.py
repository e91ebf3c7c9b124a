import torch

from eri.layers.heads import merge_heads, split_heads


def test_a_head_owns_a_contiguous_slice_of_the_features() -> None:
    x = torch.randn(2, 5, 12)
    heads = split_heads(x, 3)
    assert heads.shape == (2, 3, 5, 4)
    assert torch.equal(heads[:, 1], x[..., 4:8])
    assert torch.equal(merge_heads(heads), x)

import pytest
import torch

from eri.layers.mask import attention_mask, causal_mask

Q = torch.zeros(2, 4, 5, 8)
K = torch.zeros(2, 4, 7, 8)


def test_a_causal_mask_is_aligned_at_the_top_left() -> None:
    mask = causal_mask(3, 5, torch.device("cpu"))
    assert [row.nonzero().flatten().tolist() for row in mask] == [[0], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7), (1, 5, 7), (2, 1, 5, 7), (2, 4, 5, 7)])
def test_masks_broadcast_to_scores(shape: tuple[int, ...]) -> None:
    mask, blind = attention_mask(torch.ones(shape, dtype=torch.bool), False, Q, K)
    assert mask.expand(2, 4, 5, 7).all()
    assert not blind.any()


@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 7), (2, 3, 5, 7), (7,), (1, 2, 4, 5, 7)])
def test_other_shapes_are_refused_with_what_fits(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[5, 7\], \[2, 5, 7\]") as error:
        attention_mask(torch.ones(shape), False, Q, K)
    assert str(list(shape)) in str(error.value)


def test_blind_queries_are_told_apart_and_their_mask_is_usable() -> None:
    seen = torch.ones(5, 7, dtype=torch.bool)
    seen[2] = False
    added = torch.zeros(5, 7).masked_fill(~seen, -torch.inf)
    for given in (seen, seen.long(), added):
        mask, blind = attention_mask(given, False, Q, K)
        assert blind.flatten().nonzero().tolist() == [[2]]
        usable = mask if mask.dtype == torch.bool else mask > -torch.inf
        assert usable.any(-1).all()

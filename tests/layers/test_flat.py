import pytest
import torch
from torch import nn

from eri.layers.flat import ALIGNMENT, Flat

SHAPES = {"a": (3, 5), "b": (8,), "c": (2, 3, 1, 1), "d": (1, 16)}
STARTS = {"a": 0, "b": 16, "c": 24, "d": 32}  # each at a multiple of 8
BUFFERS = ("master", "grad", "exp_avg", "exp_avg_sq")


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}


def gaps(flat: Flat) -> torch.Tensor:
    """Which elements belong to no parameter."""
    taken = torch.zeros_like(flat.master)
    for view in flat.views(taken).values():
        view.fill_(1)
    return taken == 0


def test_every_buffer_has_one_layout() -> None:
    given = parameters()
    flat = Flat(given)
    assert list(flat.parameters) == list(given)
    for name in BUFFERS:
        buffer = getattr(flat, name)
        assert buffer.shape == (48,)
        assert buffer.dtype == torch.float32
        views = flat.views(buffer)
        assert list(views) == list(given)
        for key, view in views.items():
            assert view.shape == SHAPES[key]
            assert view.storage_offset() == STARTS[key]
            assert view.data_ptr() == buffer[STARTS[key] :].data_ptr()
            assert STARTS[key] % ALIGNMENT == 0
    assert gaps(flat).sum() == 48 - (15 + 8 + 6 + 16)


def test_parameters_keep_their_numbers_and_what_is_new_is_zero() -> None:
    given, before = parameters(), parameters()
    flat = Flat(given)
    for name, parameter in given.items():
        assert torch.equal(parameter, before[name])
    for name in ("grad", "exp_avg", "exp_avg_sq"):
        assert not getattr(flat, name).any()
    assert not flat.master[gaps(flat)].any()


def test_parameters_and_their_gradients_are_views() -> None:
    given = parameters()
    flat = Flat(given)
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in given.values())
    flat.master.mul_(2)
    for name, parameter in given.items():
        assert torch.equal(parameter, 2 * parameters()[name])
    for times in (1, 2):  # the backward pass adds onto what is there
        sum((parameter * parameter.detach()).sum() for parameter in given.values()).backward()
        for name, view in flat.views(flat.grad).items():
            assert torch.equal(view, times * given[name])
        assert not flat.grad[gaps(flat)].any()
    flat.grad.zero_()
    assert not any(parameter.grad.any() for parameter in given.values())


def test_who_reads_copies_is_told() -> None:
    told = []
    flat = Flat(parameters(), lambda: told.append(1))
    assert not told
    flat.changed()
    assert told == [1]
    Flat(parameters()).changed()


def test_like_shapes_of_whole_pieces_lie_side_by_side() -> None:
    given = {name: nn.Parameter(torch.randn(4, 6)) for name in "abc"}
    flat = Flat(given)
    assert torch.equal(flat.master.view(3, 4, 6), torch.stack(list(given.values())))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_type_is_refused(dtype: torch.dtype) -> None:
    wrong = {"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(2, dtype=dtype))}
    with pytest.raises(ValueError, match=f"expected float32 parameters, found .*'b': {dtype}"):
        Flat(wrong)


def test_no_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match="found none"):
        Flat({})

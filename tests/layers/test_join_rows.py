"""Joined rows are those of `torch.cat`, with room behind them."""

import pytest
import torch
from torch import Tensor

from eri.layers.join_rows import join_rows, join_rows_reference, unsupported
from tests.kernel_checks import copy_bandwidth, microseconds

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def parts_of(count: int, rows: int, width: int, device, dtype=torch.bfloat16) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(rows, width, device=device).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("tail", [0, 8, 48])
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (7, 40), (308, 640), (1000, 1280)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_they_are_those_of_cat(device, count: int, rows: int, width: int, tail: int, dtype) -> None:
    parts = parts_of(count, rows, width, device, dtype)
    joined = join_rows(parts, tail)
    assert joined.shape == (rows, count * width + tail)
    assert torch.equal(joined[:, : count * width], torch.cat(parts, dim=1))
    assert (joined is parts[0]) == (count == 1 and tail == 0)


def test_rows_with_gaps_and_rows_that_lie_across(device: torch.device) -> None:
    parts = parts_of(3, 50, 64, device)
    wide = torch.cat(parts, dim=1)
    views = [wide[:, i * 64 : (i + 1) * 64] for i in range(3)]
    assert torch.equal(join_rows(views, 8)[:, :192], wide)
    across = [part.t().contiguous().t() for part in parts]
    assert torch.equal(join_rows(across, 8)[:, :192], wide)


def test_what_the_kernel_cannot_do_is_said() -> None:
    assert unsupported(parts_of(2, 4, 8, "cpu")) is None
    assert unsupported(parts_of(2, 4, 12, "cpu")) == "rows of 12 elements, not a multiple of 8"
    assert unsupported(parts_of(1, 4, 8, "cpu"), 4) == "a tail of 4 elements is no multiple of 8"
    double = parts_of(1, 4, 8, "cpu", torch.float64)
    assert unsupported(double) == "rows is float64, not float32, float16 or bfloat16"
    huge = torch.empty(2**20, 2**15, device="meta", dtype=torch.bfloat16)
    assert "too many elements" in str(unsupported([huge]))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_op_is_registered_as_pytorch_wants_it(device: torch.device, count: int) -> None:
    parts = parts_of(count, 6, 16, device)
    join_rows(parts, 8)  # loads the kernels
    given = [*parts, None, None][:3]
    torch.library.opcheck(torch.ops.eri.join_rows, (*given, 0))


@pytest.mark.gpu
def test_the_tail_is_not_written() -> None:
    parts = parts_of(3, 1000, 1280, "cuda")
    marked = torch.full((1000, 3 * 1280 + 48), 7.0, device="cuda", dtype=torch.bfloat16)
    place = marked.data_ptr()
    del marked
    joined = join_rows(parts, 48)
    assert joined.data_ptr() == place  # the memory that was marked
    assert (joined[:, -48:] == 7).all()


@pytest.mark.gpu
def test_wrong_rows_are_refused() -> None:
    rows = torch.zeros(4, 8, device="cuda", dtype=torch.bfloat16)
    join_rows([rows], 8)  # loads the kernels
    for given, message in [
        ((rows, None, rows, 0), "no second"),
        ((rows, rows[:2], None, 0), "second has 16 elements"),
        ((rows, rows.half(), None, 0), "second is of type Half"),
        ((rows, rows.cpu(), None, 0), "second is not on cuda"),
        ((rows, None, None, 4), "tail is 4"),
        ((rows[:, :4], None, None, 0), "rows have 4 elements"),
        ((rows[None], None, None, 0), "3 dimensions"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.eri.join_rows(*given)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "width"), [(4096, 1280), (16384, 640)])
def test_bandwidth(rows: int, width: int) -> None:
    sets = [parts_of(3, rows, width, "cuda") for _ in range(4)]
    time = microseconds(lambda i: join_rows(sets[i], 48))
    eager = microseconds(lambda i: join_rows_reference(sets[i], 48))
    speed = 2 * 2 * 3 * rows * width / time * 1e6
    share = speed / copy_bandwidth()
    print(
        f"\n3 x {rows} x {width}: {time:.1f} us, {speed / 1e12:.2f} TB/s, {share:.0%} of a copy's; "
        f"cat takes {eager:.1f} us"
    )
    assert share > 0.7

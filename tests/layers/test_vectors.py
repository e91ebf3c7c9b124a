import pytest
import torch
from torch import Tensor

from eri.layers.build import SOURCES
from eri.layers.vectors import (
    VECTOR,
    aligned,
    aligned_rows,
    type_name,
    unsupported_tail,
    unsupported_type,
    with_tail,
)
from tests.kernel_checks import poison


def test_types_have_names() -> None:
    assert type_name(torch.bfloat16) == "bfloat16"
    assert unsupported_type("x", torch.zeros(1, dtype=torch.float16)) is None
    found = unsupported_type("x", torch.zeros(1, dtype=torch.float64))
    assert found == "x is float64, not float32, float16 or bfloat16"


def test_a_vector_is_as_long_as_that_of_the_kernels() -> None:
    assert f"kSize = {VECTOR} / sizeof(Scalar);" in (SOURCES / "vectors.h").read_text()


def test_what_lies_as_it_should_is_not_copied() -> None:
    memory = torch.randn(64, dtype=torch.float32)
    begins = memory[4:36].view(4, 8)
    assert aligned(begins) is begins and aligned_rows(begins) is begins
    between = memory[1:33].view(4, 8)
    for copy in (aligned(between), aligned_rows(between)):
        assert copy.data_ptr() != between.data_ptr() and torch.equal(copy, between)


MEMORY = torch.randn(256)


@pytest.mark.parametrize(
    "rows",
    [
        MEMORY.view(16, 16)[:, 4:12],
        MEMORY.view(16, 16)[::2, :12],
        MEMORY.view(2, 8, 16)[..., :8],
        MEMORY.view(1, 16, 16)[..., :8],
        MEMORY[:8].expand(5, 8),
        MEMORY[4:12],
    ],
)
def test_rows_at_one_stride_are_not_copied(rows: Tensor) -> None:
    assert aligned_rows(rows) is rows


@pytest.mark.parametrize(
    "rows",
    [
        MEMORY.view(16, 16).t(),
        MEMORY[::2],
        MEMORY.view(16, 16)[:, 1:9],
        MEMORY[:252].view(14, 18)[:, :8],
        MEMORY.view(2, 8, 16)[:, :7, :8],
        MEMORY.view(2, 8, 16).transpose(0, 1)[..., :8],
    ],
)
def test_rows_that_lie_otherwise_are_copied(rows: Tensor) -> None:
    copy = aligned_rows(rows)
    assert copy.data_ptr() != rows.data_ptr()
    assert copy.is_contiguous() and torch.equal(copy, rows)


def test_tails() -> None:
    rows = torch.randn(2, 3, 4)
    assert with_tail(rows, 0).data_ptr() == rows.data_ptr() and with_tail(rows, 0).shape == (6, 4)
    with poison():
        wide = with_tail(rows, 8)
    assert wide.shape == (6, 12) and wide.is_contiguous()
    assert torch.equal(wide[:, :4], rows.view(6, 4)) and wide[:, 4:].isnan().all()
    assert unsupported_tail(0, rows) is None and unsupported_tail(4, rows) is None
    assert unsupported_tail(4, rows.half()) == "a tail of 4 elements is no multiple of 8"
    assert unsupported_tail(-4, rows) == "a tail of -4 elements is no multiple of 4"

import torch

from eri.layers.build import SOURCES
from eri.layers.vectors import VECTOR, aligned, aligned_rows, type_name, unsupported_type


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
    gaps = memory.view(4, 16)[:, 4:12]
    assert aligned(gaps) is gaps
    assert aligned_rows(gaps).is_contiguous() and torch.equal(aligned_rows(gaps), gaps)

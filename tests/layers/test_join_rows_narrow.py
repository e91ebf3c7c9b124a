"""Rows that are joined and multiplied on the way are those of two kernels, one after the other."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eri.errors import ConfigError
from eri.layers.backend import set_backend
from eri.layers.build import SOURCES
from eri.layers.join_rows import MOST, join_rows
from eri.layers.lora_products import Narrow, lora_down, lora_down_reference
from eri.layers.narrow import join_rows_narrow
from tests.kernel_checks import (
    copy_bandwidth,
    error,
    microseconds,
    ops_on_cpu,
    poison,
    ulp,
    where_ops_are,
    with_gaps,
)

TYPES = [torch.float16, torch.bfloat16]
Device = torch.device | str


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def parts_of(
    count: int, rows: int, width: int, dtype: torch.dtype, device: Device = "cpu"
) -> list[Tensor]:
    return [torch.randn(rows, width, device=device).to(dtype) for _ in range(count)]


def narrow_of(
    count: int, rank: int, width: int, dtype: torch.dtype, device: Device = "cpu"
) -> Narrow:
    """Of layers of a rank: ranks are padded with zeros, and rows lie apart."""
    down = torch.randn(count, rank, width, device=device) / width**0.5
    down = torch.nn.functional.pad(down, (0, 0, 0, -rank % 8)).flatten(0, 1)
    return Narrow(with_gaps(down.to(dtype), 8), count, 0.75)


class Notes(TorchDispatchMode):
    """The names of our ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "eri":
            self.ops.append(func._schema.name.removeprefix("eri::"))
        return func(*args, **(kwargs or {}))


def ops_of(parts: Sequence[Tensor], narrow: Narrow | None) -> list[str]:
    with Notes() as notes:
        join_rows_narrow(parts, narrow)
    return notes.ops


# ----------------------------------------------------------------------------------- what they are


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    ("dtype", "ops"), [(torch.float64, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_they_are_one_after_the_other(count: int, dtype: torch.dtype, ops: bool) -> None:
    parts, narrow = parts_of(count, 5, 16, dtype), narrow_of(count, 3, 16, dtype)
    with ops_on_cpu() if ops else nullcontext():
        rows, p = join_rows_narrow(parts, narrow)
        plain, nothing = join_rows_narrow(parts, None)
    whole = torch.cat(parts, dim=1)
    assert nothing is None and torch.equal(plain, whole)
    assert p is not None and rows.shape == (5, count * 24) and p.shape == (5, count * 8)
    assert torch.equal(rows, torch.cat([whole, p], dim=1))
    expected = [
        0.75 * part.double() @ down.double().T
        for part, down in zip(parts, narrow.down.chunk(count), strict=True)
    ]
    close = 2e-2 if dtype == torch.bfloat16 else 1e-12
    torch.testing.assert_close(p.double(), torch.cat(expected, dim=1), rtol=close, atol=close)


def test_a_single_part_without_a_product_is_itself() -> None:
    (part,) = parts_of(1, 5, 16, torch.bfloat16)
    assert join_rows_narrow([part], None)[0] is part


def test_one_op_does_both_where_it_can() -> None:
    def found(
        count: int, width: int = 16, dtype: torch.dtype = torch.bfloat16, **changed: int
    ) -> list[str]:
        parts, narrow = parts_of(count, 5, width, dtype), narrow_of(count, 8, width, dtype)
        return ops_of(parts, narrow._replace(**changed))

    both, apart = ["join_rows_narrow"], ["join_rows", "lora_down"]
    with ops_on_cpu():
        assert [found(count) for count in (1, 2, 3)] == [both] * 3
        assert found(2, dtype=torch.float16) == both
        assert found(2, dtype=torch.float32) == apart
        parts, whole = parts_of(2, 5, 16, torch.bfloat16), narrow_of(1, 8, 32, torch.bfloat16)
        assert ops_of(parts, whole) == apart  # one group, which is both parts
        with pytest.raises(ConfigError, match="rows of 12 elements"):
            found(2, width=12)
    assert found(2) == []  # without ops


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_op_is_registered_as_pytorch_wants_it(device: torch.device, count: int) -> None:
    parts = parts_of(count, 6, 16, torch.bfloat16, device)
    narrow = narrow_of(count, 8, 16, torch.bfloat16, device)
    with where_ops_are(device):
        join_rows_narrow(parts, narrow)  # loads the kernels
    given = [*parts, None, None][:MOST]
    op = torch.ops.eri.join_rows_narrow.default
    torch.library.opcheck(op, (*given, narrow.down, narrow.scale))


def test_the_limit_is_that_of_the_header() -> None:
    assert f"kLoraJoined = {MOST};" in (SOURCES / "lora_products.h").read_text()


# -------------------------------------------------------------------------------------- the kernel

gpu = pytest.mark.gpu
# tokens and width: the three sizes of tiles for one part and for three, with whole tiles and others
SIZES = [
    *((1, 8), (7, 40), (8, 128), (9, 136), (31, 320), (33, 648), (77, 1280), (1024, 1280)),
    *((683, 72), (1025, 640), (2049, 328), (2731, 136), (4096, 320), (8193, 24)),
]


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 4, 8, 16, 24, 40, 48, 56, 64, 128])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_kernel_is_one_after_the_other_bit_by_bit(
    count: int, rank: int, dtype: torch.dtype
) -> None:
    set_backend("cuda")
    for tokens, width in SIZES:
        parts = [with_gaps(part, 8) for part in parts_of(count, tokens, width, dtype, "cuda")]
        narrow = narrow_of(count, rank, width, dtype, "cuda")
        ranks = len(narrow.down)
        with poison():
            rows, p = join_rows_narrow(parts, narrow)
        apart = join_rows(parts, ranks)
        p_apart = lora_down(apart, *narrow)
        assert p is not None and p.dtype == dtype and p.shape == (tokens, ranks)
        assert rows.is_contiguous() and rows.shape == (tokens, count * width + ranks)
        assert torch.equal(rows, apart) and torch.equal(p, p_apart)
        assert not p.unflatten(1, (count, -1))[..., rank:].any()
        wide = rows[:, : count * width].contiguous()
        truth = lora_down_reference(wide.double(), narrow.down.double(), count, narrow.scale)
        eager = lora_down_reference(wide, narrow.down, count, narrow.scale)
        assert error(p, truth) <= 2 * error(eager, truth) + ulp(truth, dtype)


@gpu
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_bit_is_copied(count: int) -> None:
    set_backend("cuda")
    sizes = (count, 1001, 136)
    bits = torch.randint(-(2**15), 2**15, sizes, device="cuda", dtype=torch.int16)
    parts = [*bits.view(torch.bfloat16)]  # NaN of every kind among them
    rows, _ = join_rows_narrow(parts, narrow_of(count, 8, 136, torch.bfloat16, "cuda"))
    joined = rows[:, : count * 136].contiguous().view(torch.int16)
    assert torch.equal(joined, torch.cat([*bits], dim=1))


@gpu
def test_what_is_not_finite_stays_with_its_token_and_part() -> None:
    set_backend("cuda")
    parts = parts_of(3, 40, 144, torch.bfloat16, "cuda")
    parts[1][3, 100] = torch.nan
    rows, p = join_rows_narrow(parts, narrow_of(3, 16, 144, torch.bfloat16, "cuda"))
    bad = torch.zeros(40, 48, dtype=torch.bool, device="cuda")
    bad[3, 16:32] = True
    assert p is not None and torch.equal(p.isnan(), bad)
    assert rows[:, :432].isnan().sum() == 1


@gpu
def test_parts_lie_as_they_like() -> None:
    set_backend("cuda")
    parts = parts_of(3, 50, 64, torch.bfloat16, "cuda")
    narrow = narrow_of(3, 16, 64, torch.bfloat16, "cuda")
    expected = join_rows_narrow(parts, narrow)
    wide = torch.cat([*parts, *parts], dim=1)
    around = torch.zeros(50, 3, 80, dtype=torch.bfloat16, device="cuda")
    shifted = [around[:, i, 3:67].copy_(part) for i, part in enumerate(parts)]
    for others in (
        [wide[:, i * 64 : (i + 1) * 64] for i in range(3)],  # a row apart
        [part.t().contiguous().t() for part in parts],  # across
        shifted,  # at no multiple of 16 bytes
        [parts[0], wide[:, 64:128], shifted[2]],  # each otherwise
    ):
        for one, other in zip(join_rows_narrow(others, narrow), expected, strict=True):
            assert one is not None and other is not None and torch.equal(one, other)
    constant = torch.ones(1, 64, dtype=torch.bfloat16, device="cuda").expand(50, 64)
    rows, _ = join_rows_narrow([constant] * 3, narrow)
    assert (rows[:, :192] == 1).all()


@gpu
def test_nothing_is_written_behind_the_last_row() -> None:
    set_backend("cuda")
    tokens, width = 16 * 171, 64  # half of the last tile of 32; rows end where memory is given out
    parts = parts_of(3, tokens, width, torch.bfloat16, "cuda")
    narrow = narrow_of(3, 16, width, torch.bfloat16, "cuda")
    join_rows_narrow(parts, narrow)  # loads the kernels
    torch.cuda.empty_cache()
    marked = torch.full((2**24,), 7.0, device="cuda", dtype=torch.bfloat16)
    del marked
    rows, _ = join_rows_narrow(parts, narrow)
    behind = torch.empty(2**20, device="cuda", dtype=torch.bfloat16)
    assert rows.nbytes % 512 == 0 and behind.data_ptr() == rows.data_ptr() + rows.nbytes
    assert (behind == 7).all()


@gpu
def test_rows_of_no_tokens_are_none() -> None:
    set_backend("cuda")
    parts = parts_of(3, 0, 16, torch.bfloat16, "cuda")
    rows, p = join_rows_narrow(parts, narrow_of(3, 8, 16, torch.bfloat16, "cuda"))
    assert p is not None and rows.shape == (0, 72) and p.shape == (0, 24)


@gpu
@pytest.mark.parametrize(("count", "tokens"), [(3, 3001), (3, 700), (1, 4096), (1, 77)])
@pytest.mark.parametrize("rank", [16, 64])
def test_the_kernel_gives_the_same_bits_twice_and_in_a_graph(
    count: int, tokens: int, rank: int
) -> None:
    set_backend("cuda")
    parts = parts_of(count, tokens, 648, torch.bfloat16, "cuda")
    narrow = narrow_of(count, rank, 648, torch.bfloat16, "cuda")
    first, again = join_rows_narrow(parts, narrow), join_rows_narrow(parts, narrow)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = join_rows_narrow(parts, narrow)
    graph.replay()
    for one, other, in_graph in zip(first, again, captured, strict=True):
        assert one is not None and other is not None and in_graph is not None
        assert torch.equal(one, other) and torch.equal(one, in_graph)


@gpu
@pytest.mark.parametrize("count", [1, 3])
def test_what_the_kernel_cannot_do_two_kernels_do(count: int) -> None:
    set_backend("cuda")  # which refuses PyTorch's own operations
    parts = parts_of(count, 9, 64, torch.float32, "cuda")
    narrow = narrow_of(count, 16, 64, torch.float32, "cuda")
    rows, p = join_rows_narrow(parts, narrow)
    assert p is not None and torch.equal(rows, torch.cat([*parts, p], dim=1))
    wide = torch.cat(parts, dim=1).double()
    truth = lora_down_reference(wide, narrow.down.double(), count, narrow.scale)
    assert error(p, truth) <= 4 * ulp(truth, torch.float32)


@gpu
def test_what_no_kernel_can_do_pytorch_does() -> None:
    said: list[str] = []
    set_backend("auto", said.append)
    parts = parts_of(3, 9, 12, torch.bfloat16, "cuda")
    rows, p = join_rows_narrow(parts, narrow_of(3, 8, 12, torch.bfloat16, "cuda"))
    assert p is not None and torch.equal(rows, torch.cat([*parts, p], dim=1))
    assert any("join_rows: PyTorch's own operations" in line for line in said)


@gpu
def test_wrong_parts_are_refused() -> None:
    set_backend("cuda")
    rows = torch.zeros(4, 16, device="cuda", dtype=torch.bfloat16)
    down = torch.zeros(24, 16, device="cuda", dtype=torch.bfloat16)
    join_rows_narrow([rows] * 3, Narrow(down, 3, 1.0))  # loads the kernels
    one, two = (rows, None, None), (rows, rows, None)
    for given, matrix, message in [
        ((rows, None, rows), down, "there is a third, but no second"),
        ((rows, rows[:2], None), down, r"second is \[2, 16\], expected \[4, 16\]"),
        ((rows, rows[:, :8], None), down, r"second is \[4, 8\], expected \[4, 16\]"),
        ((rows, rows.half(), None), down, "second is of type Half"),
        ((rows, rows.cpu(), None), down, "second is not on cuda"),
        ((rows.float(), None, None), down, "first is of type Float, expected float16"),
        ((rows[None], None, None), down, "first is not a matrix"),
        ((rows[:, :4], None, None), down, "first has rows of 4 elements"),
        ((rows[:, 4:12], None, None), down, "first does not begin at a multiple of 16 bytes"),
        (one, down.half(), "down is of type Half"),
        (one, down[:, :8], "down has 8 columns, expected 16"),
        (one, down[:4], "a group has 4 ranks, expected a multiple of 8"),
        (two, down, "a group has 12 ranks, expected a multiple of 8"),
        (two, down[:9], "down has 9 rows, expected a multiple of 2"),
        (one, down.repeat(172, 1), "down has 4128 rows, expected at most 4096"),
    ]:
        with pytest.raises(RuntimeError, match=f"join_rows_narrow: {message}"):
            torch.ops.eri.join_rows_narrow(*given, matrix, 1.0)


@gpu
def test_bandwidth() -> None:
    set_backend("cuda")
    best = copy_bandwidth()
    print(f"\na copy moves {best / 1e12:.2f} TB/s")
    for count, tokens, width, rank in (
        *((3, 4096, 1280, 16), (3, 16384, 640, 16), (3, 1024, 1280, 16), (3, 4096, 640, 16)),
        *((3, 4096, 1280, 32), (3, 4096, 1280, 48), (3, 4096, 1280, 64), (3, 4096, 1280, 128)),
        *((1, 4096, 1280, 16), (1, 16384, 640, 16), (1, 1024, 1280, 16)),
    ):
        sets = [parts_of(count, tokens, width, torch.bfloat16, "cuda") for _ in range(4)]
        narrow = narrow_of(count, rank, width, torch.bfloat16, "cuda")
        ranks = len(narrow.down)
        joined = [join_rows(parts, ranks) for parts in sets]
        both = microseconds(lambda i, s=sets, n=narrow: join_rows_narrow(s[i], n))
        copied = microseconds(lambda i, s=sets, r=ranks: join_rows(s[i], r))
        product = microseconds(lambda i, j=joined, n=narrow: lora_down(j[i], *n))

        def apart(i: int, s: list[list[Tensor]] = sets, n: Narrow = narrow) -> Tensor:
            return lora_down(join_rows(s[i], len(n.down)), *n)

        together = microseconds(apart)
        moved = 2 * tokens * (2 * count * width + 2 * ranks)
        print(
            f"{count} x {tokens:5d} x {width:4d}, rank {rank:3d}: {both:5.1f} us, "
            f"{moved / both / best * 1e6:4.0%} of a copy; one after the other {together:5.1f}, "
            f"alone {copied:.1f} and {product:.1f} us"
        )

"""Copies of matrices are what `copy_` makes, in one launch."""

from collections.abc import Iterator

import pytest
import torch

from eri.layers.lora import MatrixCopy
from eri.layers.lora_copies import LoRACopies, unsupported
from tests.kernel_checks import copy_bandwidth, microseconds

SHAPES = [(1, 8), (16, 1280), (10240, 16), (3, 7), (128, 640), (0, 8)]


def copies(device: torch.device | str, dtype: torch.dtype) -> list[MatrixCopy]:
    """Down matrices, up matrices, and those transposed, into rows of wider ones."""
    torch.manual_seed(0)
    found = []
    for rows, columns in SHAPES:
        source = torch.randn(rows, columns, device=device)
        wide = torch.full((rows + 1, columns + 5), 7.0, device=device, dtype=dtype)
        found.append(MatrixCopy(source, wide[:rows, 5:]))
        turned = torch.full((columns, rows), 7.0, device=device, dtype=dtype)
        found.append(MatrixCopy(source.T, turned))
    return found


def are_made(made: list[MatrixCopy]) -> Iterator[bool]:
    return (torch.equal(target, source.to(target.dtype)) for source, target in made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_they_are_made_each_time(device: torch.device, dtype: torch.dtype) -> None:
    made = copies(device, dtype)
    work = LoRACopies(iter(made))
    for _ in range(2):
        assert not any(torch.equal(t, s.to(dtype)) for s, t in made if t.numel())
        work()
        assert all(are_made(made))
        for source, _ in made:
            source.normal_()
    for _, target in made[::2]:
        whole = target._base
        assert whole is not None
        assert (whole[-1] == 7).all() and (whole[:, :5] == 7).all()  # what is beside them stays


def test_no_copies_are_none() -> None:
    LoRACopies([])()


def test_what_the_kernel_cannot_do_is_said() -> None:
    good = copies("cpu", torch.bfloat16)
    assert unsupported(good) is None
    wide = [MatrixCopy(source.double(), target) for source, target in good]
    assert unsupported(wide) == "it would copy from float64, not from float32"
    mixed = [*good, *copies("cpu", torch.float16)]
    assert unsupported(mixed) is not None
    double = [MatrixCopy(source, target.double()) for source, target in good]
    assert unsupported(double) == (
        "it would copy into float64, not into one of float32, float16 or bfloat16"
    )
    turned = [MatrixCopy(torch.zeros(8, 4), torch.zeros(4, 8).T)]
    assert unsupported(turned) == "a copy of [8, 4] does not lie in rows of [8, 4]"
    elsewhere = MatrixCopy(torch.zeros(8, 4, device="meta"), torch.zeros(8, 4))
    assert unsupported([elsewhere]) == "a copy is from meta to cpu"
    huge = MatrixCopy(*torch.zeros(2, 1, device="meta").expand(2, 2**31).unflatten(1, (2**15, -1)))
    assert unsupported([huge]) == "a copy of [32768, 65536] is too large"


@pytest.mark.gpu
def test_a_graph_makes_them_again() -> None:
    made = copies("cuda", torch.bfloat16)
    work = LoRACopies(made)
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for source, _ in made:
        source.normal_()
    graph.replay()
    assert all(are_made(made))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(2, 7), "table is not"),
        (torch.zeros(2, 6, dtype=torch.long), "table is not"),
        (torch.zeros(7, 2, dtype=torch.long).T, "table is not"),
    ],
)
def test_a_wrong_table_is_refused(wrong: torch.Tensor, message: str) -> None:
    LoRACopies(copies("cuda", torch.bfloat16))()  # loads the kernels
    with pytest.raises(RuntimeError, match=message):
        torch.ops.eri.lora_copies(wrong.cuda(), 2)
    with pytest.raises(RuntimeError, match="no type 3"):
        torch.ops.eri.lora_copies(torch.zeros(1, 7, dtype=torch.long, device="cuda"), 3)


@pytest.mark.gpu
def test_bandwidth() -> None:
    made = []
    for _ in range(360):  # about the matrices of SDXL at rank 16
        for rows, columns in ((16, 1280), (1280, 16)):
            source = torch.randn(rows, columns, device="cuda")
            target = torch.empty(rows, columns + 16, device="cuda", dtype=torch.bfloat16)
            made.append(MatrixCopy(source, target[:, :columns]))
    work = LoRACopies(made)
    time = microseconds(lambda _: work(), sets=1)
    moved = sum(6 * source.numel() for source, _ in made)
    speed = moved / time * 1e6
    print(f"\n{len(made)} copies: {time:.1f} us, {speed / 1e12:.2f} TB/s")
    assert speed > 0.2 * copy_bandwidth()  # small matrices, numbers one by one

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eri.errors import ConfigError
from eri.layers import SAMultiHead, apply_rope
from eri.layers.backend import set_backend
from eri.layers.build import SOURCES
from eri.layers.heads import split_heads
from eri.layers.rope import MOST_ELEMENTS, MOST_POSITIONS, rope_reference, unsupported
from tests.kernel_checks import copy_bandwidth, error, gradients, microseconds, ops_on_cpu, ulp

TYPES = [torch.float32, torch.float16, torch.bfloat16]
BASE = 10000.0


def test_c104_golden_pair(device: torch.device) -> None:
    x = torch.zeros(2, 2, device=device)
    x[1] = torch.tensor([2.0, 5.0])
    y = apply_rope(x).cpu()
    torch.testing.assert_close(y[1], torch.tensor([-3.12675, 4.38445]), atol=1e-5, rtol=0)
    assert torch.equal(y[0], torch.zeros(2))


def test_c104_neighbours_make_pairs_with_falling_frequencies() -> None:
    x = torch.zeros(11, 4)
    x[10] = torch.tensor([1.0, 0.0, 1.0, 0.0])
    angles = torch.tensor([10.0, 10 * 10000**-0.5])
    expected = torch.stack((angles.cos(), angles.sin()), -1).flatten()
    torch.testing.assert_close(apply_rope(x)[10], expected)


def test_c104_lengths_are_kept(device: torch.device) -> None:
    x = torch.randn(2, 3, 50, 8, device=device)
    torch.testing.assert_close(apply_rope(x).norm(dim=-1), x.norm(dim=-1))


def test_c104_products_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 8, dtype=torch.float64)
    rotated_q, rotated_k = apply_rope(q.expand(40, 8)), apply_rope(k.expand(40, 8))
    products = rotated_q @ rotated_k.T
    for distance in (-7, 0, 3):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_c104_the_gradient_is_the_inverse_rotation() -> None:
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    y = apply_rope(x)
    (gradient,) = torch.autograd.grad(y, x, y.detach())
    torch.testing.assert_close(gradient, x.detach())


def test_c104_an_odd_head_size_is_refused() -> None:
    with pytest.raises(ValueError, match="even head size, found 5"):
        apply_rope(torch.zeros(3, 5))


def test_angles_stay_exact_in_16_bits() -> None:
    x = torch.randn(2000, 8)
    y = apply_rope(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), apply_rope(x.bfloat16().float()), atol=0.02, rtol=0.01)


def leaf(numbers: Tensor) -> Tensor:
    return numbers.detach().requires_grad_()


def test_the_inverse_undoes_the_rotation() -> None:
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    turned = torch.ops.eri.rope(x, BASE, False)
    assert torch.equal(turned, apply_rope(x)) and not torch.allclose(turned, x)
    torch.testing.assert_close(torch.ops.eri.rope(turned, BASE, True), x)


@pytest.mark.parametrize("inverse", [False, True])
def test_the_op_has_the_right_gradients_of_both_orders(inverse: bool) -> None:
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        return torch.ops.eri.rope(x, BASE, inverse)

    assert torch.autograd.gradcheck(call, (x,))
    assert torch.autograd.gradgradcheck(call, (x,))


@pytest.mark.parametrize("shape", [(4, 8), (3, 4, 8), (2, 3, 4, 8), (2, 2, 3, 4, 8)])
def test_where_there_are_kernels_any_leading_dimensions_take_the_op(
    shape: tuple[int, ...],
) -> None:
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    expected = gradients(apply_rope(x, base=100.0), dy, x)
    with ops_on_cpu():
        turned = torch.ops.eri.rope(torch.zeros(1, 1, 4, 8, requires_grad=True), 100.0, False)
        assert turned.grad_fn is not None
        y = apply_rope(x, base=100.0)
        assert turned.grad_fn.name() in names_behind(y)
        torch.testing.assert_close(gradients(y, dy, x), expected)
        with pytest.raises(ConfigError, match="rope: x has heads of 6 elements"):
            apply_rope(torch.zeros(3, 6))


def names_behind(y: Tensor) -> set[str]:
    """Of the functions that made a tensor."""
    names, functions = set[str](), [y.grad_fn]
    while functions:
        if (function := functions.pop()) is not None:
            names.add(function.name())
            functions += [before for before, _ in function.next_functions]
    return names


def test_attention_is_the_same_with_the_op() -> None:
    layer, x = SAMultiHead(16, 8, 2, 5), torch.randn(3, 5, 16, requires_grad=True)
    dy = torch.randn(3, 5, 16)
    expected = gradients(layer(x), dy, x, *layer.parameters())
    with ops_on_cpu():
        torch.testing.assert_close(gradients(layer(x), dy, x, *layer.parameters()), expected)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 3, 16), (2, 3, 5, 8)])
def test_the_op_is_registered_as_pytorch_wants_it(
    shape: tuple[int, ...], inverse: bool, device: torch.device
) -> None:
    if device.type == "cuda":
        loaded()
    x = torch.randn(shape, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.eri.rope.default, (x, BASE, inverse))
    across = x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(torch.ops.eri.rope.default, (across, BASE, inverse))


def test_reasons_are_in_words() -> None:
    half = torch.float16
    assert unsupported(torch.zeros(3, 4)) is None
    assert unsupported(torch.zeros(2, 3, 8, dtype=half)) is None
    found = unsupported(torch.zeros(3, 4, dtype=half))
    assert found == "x has heads of 4 elements, not a multiple of 8"
    assert unsupported(torch.zeros(3, 6)) == "x has heads of 6 elements, not a multiple of 4"
    found = unsupported(torch.zeros(3, 4, dtype=torch.float64))
    assert found == "x is float64, not float32, float16 or bfloat16"
    assert unsupported(torch.zeros(0, 3, 8)) == "x has no elements"
    assert unsupported(torch.zeros(0, 8)) == "x has no elements"
    long = torch.empty(2**24, 8, device="meta")
    assert unsupported(long) == "x has 16777216 positions of 8 elements, too many"
    wide = torch.empty(2**23, 2**8, device="meta")
    assert unsupported(wide) == "x has 8388608 positions of 256 elements, too many"
    many = torch.empty(2**31, 1, 8, device="meta")
    assert unsupported(many) == "x has 2147483648 sequences, too many"


def test_the_limits_are_those_of_the_header() -> None:
    header = (SOURCES / "rope.h").read_text()
    for name, limit in {"Positions": MOST_POSITIONS, "Elements": MOST_ELEMENTS}.items():
        assert f"kRope{name} = 1LL << {limit.bit_length() - 1};" in header


def test_the_backend_cuda_refuses_other_devices() -> None:
    set_backend("cuda")
    with pytest.raises(ConfigError, match="this is cpu"):
        apply_rope(torch.zeros(2, 8))


# ------------------------------------------------------------------------------------- the kernel

gpu = pytest.mark.gpu
SHAPES = [(2, 8, 1024, 64), (3, 5, 77, 40), (1, 1, 8), (2, 4097, 128), (7, 8), (2, 2, 3, 9, 16)]


def loaded() -> None:
    """Builds and loads the kernels and refuses anything else."""
    set_backend("cuda")
    apply_rope(torch.ones(1, 8, device="cuda"))


@gpu
@pytest.mark.parametrize("base", [BASE, 100.0])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_no_less_exact_than_eager(
    shape: tuple[int, ...], dtype: torch.dtype, base: float
) -> None:
    set_backend("cuda")
    x = leaf(torch.randn(shape, device="cuda").to(dtype))
    dy = torch.randn(shape, device="cuda").to(dtype)
    true = leaf(x.double())
    truth = gradients(rope_reference(true, base, False), dy.double(), true)
    eager = gradients(rope_reference(x, base, False), dy, x)
    found = gradients(apply_rope(x, base=base), dy, x)
    for one, other, exact in zip(found, eager, truth, strict=True):
        assert one.dtype == dtype and one.shape == exact.shape and one.is_contiguous()
        assert error(one, exact) <= 2 * error(other, exact) + ulp(exact, dtype)


@gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_heads_that_lie_otherwise(dtype: torch.dtype) -> None:
    set_backend("cuda")
    tokens = torch.randn(3, 9, 5 * 16, device="cuda").to(dtype)
    heads = split_heads(tokens, 5)  # [3, 5, 9, 16]
    dense = heads.contiguous()
    dy = torch.randn(heads.shape, device="cuda").to(dtype)
    first = leaf(dense)
    expected = gradients(apply_rope(first), dy, first)
    shifted = torch.empty(dense.numel() + 1, device="cuda", dtype=dtype)[1:].view(dense.shape)
    shifted.copy_(dense)
    slices = torch.stack([dense, dense], -1).flatten(-2)[..., ::2]
    wide = torch.full((3, 5, 9, 20), torch.nan, device="cuda", dtype=dtype)[..., :16].copy_(dense)
    packed = split_heads(torch.cat([tokens, tokens], -1)[..., 5 * 16 :], 5)
    for x in (heads, shifted, slices, wide, packed, dense.mT.contiguous().mT):
        for like_dy in (dy, dy.transpose(1, 2).contiguous().transpose(1, 2)):
            given = x.detach().requires_grad_()
            found = gradients(apply_rope(given), like_dy, given)
            assert all(map(torch.equal, found, expected))
    row = dy[:1, :1].expand_as(dy)
    given = leaf(dense)
    found = gradients(apply_rope(given), row, given)
    assert all(map(torch.equal, found, gradients(apply_rope(given), row.contiguous(), given)))


@gpu
def test_many_sequences_are_each_rotated() -> None:
    set_backend("cuda")
    x = torch.randn(300_001, 2, 4, device="cuda")  # more than a grid has blocks for
    torch.testing.assert_close(apply_rope(x), rope_reference(x, BASE, False))


@gpu
def test_the_kernel_gives_the_same_bits_twice_and_in_a_graph() -> None:
    loaded()
    x = torch.randn(2, 5, 1025, 40, device="cuda").bfloat16()

    def both() -> list[Tensor]:
        return [torch.ops.eri.rope(x, BASE, inverse) for inverse in (False, True)]

    first = both()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    graph.replay()
    for once, again, in_graph in zip(first, both(), captured, strict=True):
        assert torch.equal(once, again) and torch.equal(once, in_graph)


@gpu
def test_what_the_kernel_cannot_do_the_reference_does() -> None:
    said: list[str] = []
    set_backend("auto", said.append)
    for x in (torch.randn(3, 6, device="cuda"), torch.randn(0, 3, 8, device="cuda")):
        assert torch.equal(apply_rope(x), rope_reference(x, BASE, False))
    assert any("rope: PyTorch's own operations" in s and "heads of 6" in s for s in said)
    assert any("x has no elements" in line for line in said)


@gpu
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: x.double(), "x is of type Double"),
        (lambda x: x[0], "x has 3 dimensions, expected 4"),
        (lambda x: x[..., :12], "x has heads of 12 elements, expected a multiple of 8"),
        (lambda x: x.mT.contiguous().mT, "x has heads of 16 elements"),
        (lambda x: x.flatten()[1:97].view(1, 2, 3, 16), "x does not begin at a multiple of 16"),
        (lambda x: x.new_zeros(1, 2, 3, 20)[..., :16], "dimension 1 of x has a stride of 60"),
    ],
)
def test_the_kernel_names_what_it_cannot_take(
    wrong: Callable[[Tensor], Tensor], message: str
) -> None:
    loaded()
    x = torch.zeros(2, 3, 5, 16, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=f"rope: {message}"):
        torch.ops.eri.rope(wrong(x), BASE, False)


@gpu
def test_bandwidth() -> None:
    loaded()
    copied = copy_bandwidth()
    print(f"\na copy moves {copied / 1e12:.2f} TB/s")
    for batch, heads, length, width in ((4, 16, 1024, 64), (8, 16, 4096, 64), (8, 8, 4096, 128)):
        tokens = [torch.randn(batch, length, heads * width, device="cuda") for _ in range(4)]
        sets = [split_heads(rows.bfloat16(), heads) for rows in tokens]
        ours = microseconds(lambda i, s=sets: apply_rope(s[i]))
        theirs = microseconds(lambda i, s=sets: rope_reference(s[i], BASE, False))
        reached = 4 * sets[0].numel() / ours * 1e6
        print(
            f"{batch} x {heads} x {length} x {width}: {ours:7.1f} us, {reached / 1e12:.2f} TB/s, "
            f"eager {theirs:7.1f} us"
        )
        assert ours < theirs

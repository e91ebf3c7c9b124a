"""The sum of two maps and a number for each channel is that of PyTorch, rounded once."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eri.errors import ConfigError
from eri.layers.add_maps import add_maps, add_maps_reference, unsupported
from eri.layers.backend import set_backend
from tests.kernel_checks import copy_bandwidth, error, microseconds, ulp

TYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 8, 1, 1), (2, 40, 3, 5), (3, 320, 7, 1), (1, 64, 33, 31), (4, 320, 64, 64)]
SHAPES += [(2, 2560, 3, 3), (1, 5120, 1, 2), (5, 1288, 2, 2)]
gpu = pytest.mark.gpu


def maps(*shape: int, device: torch.device | str = "cpu", dtype=torch.float32) -> list[Tensor]:
    """Two maps that lie pixel by pixel, and a row."""
    torch.manual_seed(0)
    y, x = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    row = torch.randn(shape[1], device=device).to(dtype)
    return [*(t.contiguous(memory_format=torch.channels_last) for t in (y, x)), row]


@pytest.mark.parametrize("dtype", [torch.float64, *TYPES], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_pytorchs_sum(device: torch.device, shape: tuple[int, ...], dtype) -> None:
    y, x, bias = maps(*shape, device=device, dtype=dtype)
    if device.type == "cuda" and dtype != torch.float64:
        set_backend("cuda")
    kept, of_x, of_bias = y.clone(), x.clone(), bias.clone()
    truth = y.double() + bias.double()[:, None, None] + x.double()
    eager = y.clone()
    add_maps_reference(eager, x, bias)
    found = add_maps(y, x, bias)
    assert found is y and not torch.equal(y, kept)
    assert torch.equal(x, of_x) and torch.equal(bias, of_bias)
    assert error(y, truth) <= error(eager, truth) + ulp(truth, torch.float32)
    assert error(y, truth) <= 2 * ulp(truth, dtype)
    if device.type == "cuda" and dtype in {torch.float16, torch.bfloat16}:
        assert error(y, truth) <= 0.5 * ulp(truth, dtype)  # rounded once


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_single_map(device: torch.device, shape: tuple[int, ...], dtype) -> None:
    if device.type == "cuda":
        set_backend("cuda")
    y, _, bias = maps(*shape, device=device, dtype=dtype)
    expected = y + bias[:, None, None]
    assert add_maps(y, None, bias) is y
    assert torch.equal(y, expected)


def test_any_layout(device: torch.device) -> None:
    y, x, bias = maps(2, 16, 5, 7, device=device)
    expected = add_maps(y.clone(memory_format=torch.preserve_format), x, bias)
    wide = torch.cat([x, x], dim=1)[:, 16:]
    shifted = torch.empty(x.numel() + 1, device=device)[1:].view(2, 5, 7, 16).permute(0, 3, 1, 2)
    apart = torch.stack([bias, bias], dim=1)[:, 1]
    for like_x in (wide, shifted.copy_(x), x.contiguous()):
        assert torch.equal(add_maps(y.clone(), like_x, apart), expected)
    assert torch.equal(add_maps(y.contiguous(), x, bias), expected)
    moved = torch.empty(y.numel() + 1, device=device)[1:].view(2, 5, 7, 16).permute(0, 3, 1, 2)
    assert torch.equal(add_maps(moved.copy_(y), x, bias), expected)
    part = torch.cat([y, y], dim=1)
    assert torch.equal(add_maps(part[:, :16], x, bias), expected)
    assert torch.equal(part[:, 16:], y)


def test_no_pixel_is_no_work(device: torch.device) -> None:
    y, x, bias = maps(0, 16, 5, 7, device=device)
    assert add_maps(y, x, bias).shape == (0, 16, 5, 7)


def test_the_op_is_registered_as_pytorch_wants_it(device: torch.device) -> None:
    y, x, bias = maps(2, 16, 3, 5, device=device)
    add_maps(y, x, bias)  # loads the kernels
    torch.library.opcheck(torch.ops.eri.add_maps_.default, (y, x, bias))


def test_reasons_are_in_words() -> None:
    y, x, bias = maps(1, 8, 3, 5, dtype=torch.bfloat16)
    assert unsupported(y, x, bias) is None
    assert unsupported(y.double(), x, bias) == "y is float64, not float32, float16 or bfloat16"
    assert unsupported(y, x.float(), bias) == "x is float32, y is bfloat16"
    assert unsupported(y, x, bias.float()) == "bias is float32, y is bfloat16"
    odd = maps(1, 12, 3, 5, dtype=torch.bfloat16)
    assert unsupported(*odd) == "y has 12 channels, not a multiple of 8"
    assert unsupported(*maps(1, 12, 3, 5)) is None
    found = unsupported(y.contiguous(), x, bias)
    assert found == "y does not lie pixel by pixel (channels_last)"
    shifted = torch.empty(y.numel() + 1, dtype=y.dtype)[1:].view(1, 3, 5, 8).permute(0, 3, 1, 2)
    assert unsupported(shifted, x, bias) == "y does not begin at a multiple of 16 bytes"
    assert unsupported(*maps(0, 8, 3, 5)) == "y is [0, 8, 3, 5], too large or without elements"
    huge = torch.empty(1, 8, 2**16, 2**16, device="meta", dtype=torch.bfloat16)
    huge = huge.contiguous(memory_format=torch.channels_last)
    assert unsupported(huge, x, bias) == "y is [1, 8, 65536, 65536], too large or without elements"


def test_shapes_that_do_not_fit_are_refused() -> None:
    y, x, bias = maps(2, 8, 3, 5)
    for given in ((y, x[:1], bias), (y, x, bias[:4]), (y[0], x[0], bias), (y, x, bias[:1])):
        with pytest.raises(ValueError, match="not twice"):
            add_maps(*given)


def test_the_backend_cuda_refuses_other_devices() -> None:
    set_backend("cuda")
    with pytest.raises(ConfigError, match="this is cpu"):
        add_maps(*maps(1, 8, 3, 5))


@gpu
@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, lambda t: t.contiguous(), "y is not .* in channels_last"),
        (0, lambda t: t.double(), "y is of type Double"),
        (1, lambda t: t.contiguous(), "x is not .* in channels_last"),
        (1, lambda t: t[:1], "x has 1 elements in dimension 0, expected 2"),
        (1, lambda t: t.half(), "x is of type Half"),
        (2, lambda t: t[:8], "bias has 8 elements, expected 16"),
        (2, lambda t: t.cpu(), "bias is not on cuda:0"),
    ],
)
def test_the_kernel_names_what_it_cannot_take(
    place: int, wrong: Callable[[Tensor], Tensor], message: str
) -> None:
    given = maps(2, 16, 3, 5, device="cuda", dtype=torch.bfloat16)
    add_maps(*given)  # loads the kernels
    given[place] = wrong(given[place])
    with pytest.raises(RuntimeError, match=f"add_maps: {message}"):
        torch.ops.eri.add_maps_(*given)


@gpu
def test_in_a_graph_it_gives_the_same_bits() -> None:
    y, x, bias = maps(4, 320, 64, 64, device="cuda", dtype=torch.bfloat16)
    start = y.clone()
    expected = add_maps(start.clone(), x, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add_maps(y, x, bias)
    y.copy_(start)
    graph.replay()
    assert torch.equal(y, expected)


@gpu
@pytest.mark.parametrize(
    "shape", [(4, 320, 128, 128), (4, 640, 64, 64), (4, 1280, 32, 32)], ids=str
)
def test_bandwidth(shape: tuple[int, ...]) -> None:
    sets = [maps(*shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    time = microseconds(lambda i: add_maps(*sets[i]))
    eager = microseconds(lambda i: add_maps_reference(*sets[i]))
    speed = 6 * torch.Size(shape).numel() / time * 1e6
    share = speed / copy_bandwidth()
    print(
        f"\n{shape}: {time:.1f} us, {speed / 1e12:.2f} TB/s, {share:.0%} of a copy's; "
        f"eager {eager:.1f} us"
    )
    if shape[1] == 320:
        assert share > 0.7

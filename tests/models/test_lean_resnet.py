"""A residual block as one function computes what its modules do, and keeps less."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from eri.layers.backend import set_backend
from eri.models.blocks import ResNetBlock
from tests.kernel_checks import error, ulp

WIDTH, TIME = 16, 12
KINDS = [(WIDTH, None), (WIDTH, TIME), (2 * WIDTH, None), (2 * WIDTH, TIME)]
kinds = pytest.mark.parametrize(("out", "temb_channels"), KINDS)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    set_backend("auto")
    yield
    set_backend("auto")


def block_of(
    out: int = WIDTH, temb_channels: int | None = TIME, *, width: int = WIDTH, dtype=torch.float64
) -> ResNetBlock:
    """A frozen block of which nothing is near zero."""
    block = ResNetBlock(width, out, temb_channels=temb_channels, groups=8).to(dtype)
    for name, parameter in block.requires_grad_(False).named_parameters():
        parameter.normal_(std=1.0 if parameter.dim() == 1 else parameter[0].numel() ** -0.5)
        if name.startswith("norm") and name.endswith("weight"):
            parameter.add_(2.0)
    return block


def inputs(
    *, width: int = WIDTH, batch: int = 2, side: int = 6, dtype=torch.float64
) -> tuple[Tensor, Tensor]:
    """A map that lies pixel by pixel, and a time embedding."""
    x = (3 * torch.randn(batch, width, side, 5) + 1).contiguous(memory_format=torch.channels_last)
    return x.to(dtype), torch.randn(batch, TIME).to(dtype)


def answers(
    block: ResNetBlock, x: Tensor, temb: Tensor | None, dy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The output and the gradient of x."""
    x = x.detach().requires_grad_()
    y = block(x, temb)
    (dx,) = torch.autograd.grad(y, x, torch.cos(3 * y.detach()) if dy is None else dy)
    return y.detach(), dx


def lean(block: ResNetBlock) -> ResNetBlock:
    block.lean = True
    return block


def by_pixels(block: ResNetBlock) -> ResNetBlock:
    """With filters as `arrange` lays them."""
    for filters in (p for p in block.parameters() if p.dim() == 4):
        filters.data = filters.data.contiguous(memory_format=torch.channels_last)
    return block


@pytest.mark.parametrize("arranged", [True, False])
@kinds
def test_it_is_its_modules(out: int, temb_channels: int | None, arranged: bool) -> None:
    block, (x, temb) = block_of(out, temb_channels), inputs()
    modules = answers(block, x, temb)
    if arranged:
        by_pixels(block)
    given = x.clone()
    torch.testing.assert_close(answers(lean(block), x, temb), modules, rtol=1e-9, atol=1e-12)
    assert torch.equal(x, given)


@kinds
def test_the_gradient_is_the_slope(out: int, temb_channels: int | None) -> None:
    block, (x, temb) = lean(block_of(out, temb_channels)), inputs(side=2, batch=1)
    assert torch.autograd.gradcheck(lambda x: block(x, temb), x.requires_grad_())


@pytest.mark.parametrize("which", ["x", "dy", "part of dy", "constant dy"])
@pytest.mark.parametrize("out", [WIDTH, 2 * WIDTH])
def test_what_lies_otherwise(out: int, which: str) -> None:
    block, (x, temb) = lean(block_of(out)), inputs()
    dy = torch.randn(len(x), out, *x.shape[2:], dtype=x.dtype)
    dense = dy.contiguous(memory_format=torch.channels_last)
    if which == "x":
        expected, found = answers(block, x, temb, dy), answers(block, x.contiguous(), temb, dy)
    elif which == "dy":
        expected, found = answers(block, x, temb, dense), answers(block, x, temb, dy)
    elif which == "part of dy":  # what a concatenation sends back
        part = torch.cat([dense, dense], dim=1)[:, out:]
        expected, found = answers(block, x, temb, dense), answers(block, x, temb, part)
    else:  # what sum() sends back
        one = torch.ones((), dtype=dy.dtype).expand_as(dy)
        expected, found = answers(block, x, temb, one.contiguous()), answers(block, x, temb, one)
    torch.testing.assert_close(found, expected)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in found)


def oddly(x: Tensor) -> Tensor:
    """A batch of one whose strides say nothing of how its pixels lie."""
    return torch.empty_like(x).as_strided(x.shape, (1, *x.stride()[1:])).copy_(x)


@pytest.mark.parametrize(("batch", "side"), [(1, 6), (1, 1), (3, 1)])
@pytest.mark.parametrize("out", [WIDTH, 2 * WIDTH])
def test_few_samples_and_pixels(out: int, batch: int, side: int) -> None:
    block, (x, temb) = by_pixels(block_of(out)), inputs(batch=batch, side=side)
    modules = answers(block, x, temb)
    found = answers(lean(block), x, temb)
    torch.testing.assert_close(found, modules)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in found)
    expected = answers(block, x[:1], temb[:1])
    torch.testing.assert_close(answers(block, oddly(x[:1]), temb[:1]), expected)


def test_one_time_embedding_for_all_samples() -> None:
    block, (x, temb) = block_of(), inputs(batch=3)
    modules = answers(block, x, temb[:1])
    torch.testing.assert_close(answers(lean(block), x, temb[:1]), modules)


def test_a_time_embedding_that_trains_is_refused() -> None:
    block, (x, temb) = lean(block_of()), inputs()
    with pytest.raises(ValueError, match="temb requires a gradient"):
        block(x, temb.requires_grad_())
    with torch.no_grad():
        block(x, temb)
    with pytest.raises(ValueError, match=r"pass temb \[B, E\]"):
        block(x)


def test_without_gradients_it_gives_the_same_and_nothing_to_go_back() -> None:
    block, (x, temb) = lean(block_of()), inputs()
    y, _ = answers(block, x, temb)
    assert torch.equal(block(x, temb), y) and not block(x, temb).requires_grad
    with torch.no_grad():
        assert torch.equal(block(x.requires_grad_(), temb), y)


@kinds
def test_what_is_kept(out: int, temb_channels: int | None) -> None:
    block, (x, temb) = lean(by_pixels(block_of(out, temb_channels))), inputs(side=20)
    own = {p.untyped_storage()._cdata for p in block.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x.requires_grad_(), temb)
    moments, pixels = 2 * len(x) * 8 * 2, len(x) * 20 * 5
    numbers = pixels * (WIDTH + out) + moments + (len(x) * out if temb_channels else 0)
    assert sum(size for place, size in found.items() if place not in own) == 8 * numbers


def test_the_input_may_not_change_before_the_backward_pass() -> None:
    block, (x, temb) = lean(block_of()), inputs()
    copy = x.requires_grad_().clone()
    y = block(copy, temb)
    with torch.no_grad():
        copy.fill_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_refused() -> None:
    block, (x, temb) = lean(block_of()), inputs()
    y = block(x.requires_grad_(), temb)
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("side", [16, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@kinds
def test_it_errs_no_more_than_the_modules(
    device: torch.device, out: int, temb_channels: int | None, dtype: torch.dtype, side: int
) -> None:
    if device.type == "cuda":
        set_backend("cuda")
    block = by_pixels(block_of(4 * out, temb_channels, width=4 * WIDTH, dtype=dtype)).to(device)
    x, temb = (t.to(device) for t in inputs(width=4 * WIDTH, side=side, dtype=dtype))
    dy = torch.randn(len(x), 4 * out, *x.shape[2:], device=device).to(dtype)
    theirs = answers(block, x, temb, dy)
    ours = answers(lean(block), x, temb, dy)
    block.lean = False
    exact = answers(block.double(), x.double(), temb.double(), dy.double())
    for found, other, true in zip(ours, theirs, exact, strict=True):
        assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
        assert error(found, true) <= 1.5 * error(other, true) + ulp(true, dtype)


gpu = pytest.mark.gpu
first_context = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")


@gpu
@first_context
@pytest.mark.parametrize("side", [6, 1])
@pytest.mark.parametrize("out", [64, 128])
def test_a_batch_of_one_takes_the_kernels(out: int, side: int) -> None:
    set_backend("cuda")
    block = lean(by_pixels(block_of(out, width=64, dtype=torch.bfloat16)).cuda())
    given = inputs(width=64, batch=1, side=side, dtype=torch.bfloat16)
    x, temb = (t.cuda() for t in given)
    expected = answers(block, x, temb)
    torch.testing.assert_close(answers(block, oddly(x), temb), expected)


@gpu
@first_context
@pytest.mark.parametrize("out", [320, 640])
def test_in_a_graph_it_gives_the_same_bits(out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_backend("cuda")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    block = lean(by_pixels(block_of(out, width=320, dtype=torch.bfloat16)).cuda())
    x, temb = (t.cuda() for t in inputs(width=320, side=32, dtype=torch.bfloat16))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        answers(block, x, temb)
    stream.synchronize()
    first = answers(block, x, temb)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = answers(block, x, temb)
    graph.replay()
    assert all(map(torch.equal, captured, first))


@gpu
@first_context
@pytest.mark.parametrize("out", [320, 640])
def test_no_pass_over_a_map_is_wasted(out: int) -> None:
    set_backend("cuda")
    block = lean(by_pixels(block_of(out, width=320, dtype=torch.bfloat16)).cuda())
    x, temb = (t.cuda() for t in inputs(width=320, side=64, dtype=torch.bfloat16))
    dy = torch.randn(2, out, 64, 5, device="cuda").bfloat16()
    dy = dy.contiguous(memory_format=torch.channels_last)
    answers(block, x, temb, dy)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        answers(block, x, temb, dy)
    launched = [event.name for event in profile.events() or []]
    assert any("moments_kernel" in name for name in launched), launched
    others = [name for name in launched if "elementwise" in name]
    assert len(others) <= 2, others  # silu of the time embedding and the sum of two rows

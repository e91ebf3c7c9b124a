"""Transformer blocks as one function compute what their modules do, and keep less."""

import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from eri.layers import LoRALinear
from eri.layers.projection import Projection
from eri.models.blocks import BasicTransformerBlock
from eri.models.lean import RECOMPUTE, Recompute, StackParts, transformer_blocks
from tests.kernel_checks import ops_on_cpu

WIDTH, HEADS, WORDS = 16, 2, 24
ADAPTED = {
    "all": ("attn1", "attn2", "ff"),
    "attention": ("attn1", "attn2"),
    "feed-forward": ("ff",),
    "cross-attention": ("attn2",),
    "none": (),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Stack(nn.Module):
    """Blocks one after the other, as modules or as one function."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(WIDTH, HEADS, WORDS) for _ in range(count)
        )
        self.parts: StackParts | None = None
        self.recompute: Recompute = "nothing"

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        if self.parts is not None:
            return transformer_blocks(x, context, self.parts, self.recompute)
        for block in self.blocks:
            x = block(x, context)
        return x

    def make_lean(self, lean: bool) -> None:
        if self.parts is not None:
            for projection in self.parts.projections:
                projection.release()
        self.parts = None
        if lean:
            blocks = [block for block in self.blocks if isinstance(block, BasicTransformerBlock)]
            words = [layer for block in blocks for layer in (block.attn2.to_k, block.attn2.to_v)]
            parts = [block.parts() for block in blocks]
            self.parts = StackParts(parts, Projection(words, tails=False))


def block_of(
    adapted: Sequence[str] = ADAPTED["all"], *, dtype=torch.float64, rank: int = 3, count: int = 2
) -> Stack:
    block = Stack(count).to(dtype)
    starts = tuple(f"blocks.{i}.{name}" for i in range(count) for name in adapted)
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.Linear) and starts and name.startswith(starts):
            block.set_submodule(name, LoRALinear.from_linear(module, rank, alpha=2.0))
    for name, parameter in block.named_parameters():
        parameter.data.normal_(std=0.3)
        parameter.requires_grad_("lora_" in name)
    return block


def tokens(batch: int = 2, count: int = 6, width: int = WIDTH, dtype=torch.float64) -> Tensor:
    return (3 * torch.randn(batch, count, width) + 1).to(dtype)


def trained(block: nn.Module) -> list[nn.Parameter]:
    return [p for p in block.parameters() if p.requires_grad]


def answers(block: Stack, x: Tensor, context: Tensor, dy: Tensor | None = None) -> list[Tensor]:
    """The output, the gradients of both inputs and those of the matrices."""
    x, context = x.detach().requires_grad_(), context.detach().requires_grad_()
    for parameter in trained(block):
        parameter.grad = None
    y = block(x, context)
    y.backward(torch.cos(3 * y.detach()) if dy is None else dy)
    return [y.detach(), x.grad, context.grad, *(p.grad.clone() for p in trained(block))]


def lean(block: Stack, recompute: Recompute = "nothing") -> None:
    block.make_lean(True)
    block.recompute = recompute


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_it_is_its_modules(count: int, adapted: str, recompute: Recompute) -> None:
    block = block_of(ADAPTED[adapted], count=count)
    x, context = tokens(), tokens(count=5, width=WORDS)
    modules = answers(block, x, context)
    lean(block, recompute)
    torch.testing.assert_close(answers(block, x, context), modules, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_gradients_are_the_slopes(recompute: Recompute) -> None:
    block = block_of()
    lean(block, recompute)
    pair = tokens(1, 2).requires_grad_(), tokens(1, 3, WORDS).requires_grad_()
    assert torch.autograd.gradcheck(block, pair)


@pytest.mark.parametrize("which", ["x", "context", "dy", "constant dy"])
def test_what_is_not_contiguous(which: str) -> None:
    block = block_of()
    lean(block)
    x, context = tokens(), tokens(count=5, width=WORDS)
    dy = torch.randn_like(x)
    given = {"x": x, "context": context, "dy": dy}
    if which == "constant dy":  # what sum() sends back
        dy = torch.ones((), dtype=dy.dtype).expand_as(x)
        expected = answers(block, x, context, dy.contiguous())
        found = answers(block, x, context, dy)
    else:
        expected = answers(block, **given)
        found = answers(
            block, **given | {which: given[which].transpose(0, 2).contiguous().transpose(0, 2)}
        )
    torch.testing.assert_close(found, expected)


def test_an_input_that_needs_no_gradient() -> None:
    block, x, context = block_of(), tokens(), tokens(count=5, width=WORDS)
    lean(block)
    y, _, _, *expected = answers(block, x, context)
    for parameter in trained(block):
        parameter.grad.zero_()
    again = block(x, context)
    again.backward(torch.cos(3 * again.detach()))
    assert torch.equal(again, y)
    torch.testing.assert_close([p.grad for p in trained(block)], expected)


def test_gradients_are_added_to_those_that_are_there() -> None:
    block, x, context = block_of(), tokens(), tokens(count=5, width=WORDS)
    lean(block)
    _, _, _, *once = answers(block, x, context)
    places = [p.grad.data_ptr() for p in trained(block)]
    y = block(x, context)
    y.backward(torch.cos(3 * y.detach()))
    torch.testing.assert_close([p.grad for p in trained(block)], [2 * grad for grad in once])
    assert [p.grad.data_ptr() for p in trained(block)] == places


def test_without_gradients_it_gives_the_same_and_nothing_to_go_back() -> None:
    block, x, context = block_of(), tokens(), tokens(count=5, width=WORDS)
    lean(block)
    y, *_ = answers(block, x, context)
    with torch.no_grad():
        assert torch.equal(block(x, context), y)
    bare = block_of(())
    lean(bare)
    assert not bare(x, context).requires_grad


def kept(block: Stack, x: Tensor, context: Tensor) -> int:
    """How many numbers of what was computed are kept for the backward pass."""
    own = {p.untyped_storage()._cdata for p in block.parameters()}
    found = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes() // x.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x.requires_grad_(), context)
    return sum(count for place, count in found.items() if place not in own)


@pytest.mark.parametrize("count", [1, 3])
def test_what_is_kept(count: int) -> None:
    block, x, context = block_of(count=count), tokens(2, 50), tokens(2, 5, WORDS)
    sizes = {}
    for recompute in RECOMPUTE:
        lean(block, recompute)
        sizes[recompute] = kept(block, x, context)
    rows = 2 * 50
    narrow = rows * (8 * (3 + 1 + 1 + 1 + 1 + 1) + 3 * 2 + 2 * HEADS)  # H, moments, lse
    h_words, kv = 2 * 5 * 2 * 8, 2 * 5 * 2 * WIDTH
    words = 2 * 5 * WORDS + count * h_words
    assert sizes["nothing"] <= count * (rows * WIDTH * 17 + narrow + kv) + words
    assert sizes["feed-forward"] <= count * (rows * WIDTH * 9 + narrow + kv) + words
    assert sizes["projections"] <= count * (rows * WIDTH * 5 + narrow) + words
    assert sizes["blocks"] == count * rows * WIDTH + words


class Products(TorchDispatchMode):
    """How often rows are joined and multiplied at once; the groups of the products alone."""

    def __init__(self) -> None:
        super().__init__()
        self.joined, self.alone = 0, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.joined += func is torch.ops.eri.join_rows_narrow.default
        if func is torch.ops.eri.lora_down.default:
            self.alone.append(args[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("needs_dx", [True, False])
def test_joined_rows_are_multiplied_once(needs_dx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    block = block_of(dtype=torch.bfloat16, rank=8)
    x, context = tokens(dtype=torch.bfloat16), tokens(2, 5, WORDS, torch.bfloat16)
    lean(block)
    block(x, context)  # copies the matrices, for which a CPU has no op
    with ops_on_cpu():
        found = answers(block, x, context)
        y, products = block(x.requires_grad_(needs_dx), context), Products()
        with products:
            y.backward(y.detach())
        monkeypatch.setattr("eri.layers.narrow._joins", lambda *_: False)
        apart = answers(block, x, context)
    for one, other in zip(found, apart, strict=True):
        assert torch.equal(one, other)
    assert products.joined == 1 + len(
        block.blocks
    )  # the gradient that comes; queries, keys, values
    assert 3 not in products.alone and 2 * len(block.blocks) in products.alone


def test_a_second_derivative_is_refused() -> None:
    block = block_of()
    lean(block)
    x = tokens().requires_grad_()
    y = block(x, tokens(count=5, width=WORDS))
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_it_errs_no_more_than_the_modules(
    device: torch.device, dtype: torch.dtype
) -> None:
    # both round at other places, so chance decides whose error is larger in a single gradient
    ratios = [ratio for seed in range(4) for ratio in error_ratios(device, dtype, seed)]
    assert max(ratios) < 5
    assert statistics.geometric_mean(ratios) <= 1.03


def error_ratios(device: torch.device, dtype: torch.dtype, seed: int) -> list[float]:
    """The errors of the output and of each gradient by those of the modules."""
    torch.manual_seed(seed)
    block = block_of(dtype=dtype, rank=8).to(device)
    x = tokens(2, 64, dtype=dtype).to(device)
    context = tokens(2, 77, WORDS, dtype).to(device)
    dy = torch.randn_like(x)
    theirs = answers(block, x, context, dy)
    lean(block)
    ours = answers(block, x, context, dy)
    assert all(grad.dtype == torch.float32 for grad in ours[3:])
    for name, parameter in block.named_parameters():
        parameter.grad = None
        if "lora_" in name:  # both round the matrices, so that is not what is compared
            parameter.data = parameter.data.to(dtype).double()
    exact = answers(block_like(block), x.double(), context.double(), dy.double())
    return [
        float((one.double() - truth).norm() / (other.double() - truth).norm())
        for one, other, truth in zip(ours, theirs, exact, strict=True)
    ]


def block_like(block: Stack) -> Stack:
    """The same numbers in float64, as plain modules."""
    block.make_lean(False)
    return block.double()

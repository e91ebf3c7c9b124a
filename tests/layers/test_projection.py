"""Projections with low-rank updates compute what plain modules do."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from eri.layers import Conv2d, Linear, LoRAConv2d, LoRALinear
from eri.layers.lora import LoRALayer, base_of
from eri.layers.lora_products import lora_gradients
from eri.layers.projection import Projection, project, side_by_side
from eri.layers.vectors import with_tail

WIDTH = 12  # of x
Run = Callable[[Tensor], Tensor]
DOUBLE = torch.float64


def randomised(layer: nn.Module) -> nn.Module:
    """Small random numbers everywhere: zeros hide errors."""
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.3)
    return layer


def lora(
    width: int = 8, inputs: int = WIDTH, rank: int = 4, *, alpha: float = 3.0, dtype=DOUBLE, **bias
) -> LoRALinear:
    layer = LoRALinear(inputs, width, rank, alpha=alpha, dtype=dtype, **bias)
    return randomised(layer).requires_grad_(True).eval()


def plain(width: int = 8, inputs: int = WIDTH, *, dtype=DOUBLE, bias: bool = True) -> Linear:
    return randomised(Linear(inputs, width, bias, dtype=dtype)).requires_grad_(False)


def merged(width: int = 8) -> LoRALinear:
    layer = lora(width)
    layer.merge()
    return layer


def frozen(layers: Sequence[nn.Module]) -> list[nn.Module]:
    for layer in layers:
        base_of(layer).requires_grad_(False)
    return list(layers)


LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "one": lambda: [lora()],
    "plain": lambda: [plain()],
    "three": lambda: [lora(), lora(), lora()],
    "without bias": lambda: [lora(bias=False), lora(bias=False)],
    "some with a bias": lambda: [lora(), lora(bias=False), plain(bias=False)],
    "other ranks": lambda: [lora(rank=4, alpha=4.0), lora(rank=11, alpha=11.0)],
    "mixed": lambda: [plain(), lora(), plain(), lora()],
    "two plain": lambda: [plain(), plain()],
    "merged": lambda: [merged()],
    "merged beside others": lambda: [lora(), merged(), lora()],
    "all merged": lambda: [merged(), merged()],
}


@torch.no_grad()
def lay_side_by_side(layers: Sequence[nn.Module]) -> None:
    """Move the matrices of some layers into common memory, gradients included."""
    if not all(isinstance(layer, LoRALayer) for layer in layers):
        return
    for part in ("lora_a", "lora_b"):
        parameters = [getattr(layer, part).weight for layer in layers]
        if len({p.shape for p in parameters}) > 1:
            continue
        whole = torch.stack([p.data for p in parameters])
        grads = torch.zeros_like(whole)
        for parameter, place, grad in zip(parameters, whole, grads, strict=True):
            parameter.data = place
            parameter.grad = grad


def trained(*layers: nn.Module) -> list[nn.Parameter]:
    return [
        part.weight
        for layer in layers
        if isinstance(layer, LoRALayer) and not layer.merged
        for part in (layer.lora_a, layer.lora_b)
    ]


def tokens(*shape: int, dtype=DOUBLE) -> Tensor:
    return torch.randn(*(shape or (2, 5, WIDTH)), dtype=dtype)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def answers(
    run: Run, x: Tensor, parameters: Sequence[nn.Parameter], dy: Tensor | None = None
) -> list[Tensor]:
    """The output, the gradient of x and those of the parameters, which were zero or None."""
    x = x.detach().requires_grad_(True)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.zero_()
    y = run(x)
    y.backward(torch.cos(3 * y.detach()) if dy is None else dy)
    found = [x.grad, *(p.grad for p in parameters)]
    return [y.detach(), *(torch.zeros(()) if grad is None else grad.clone() for grad in found)]


def compare(mine: Run, theirs: Run, x: Tensor, layers: Sequence[nn.Module], dy=None) -> None:
    parameters = trained(*layers)
    torch.testing.assert_close(
        answers(mine, x, parameters, dy), answers(theirs, x, parameters, dy), rtol=1e-9, atol=1e-12
    )


def modules(layers: Sequence[nn.Module]) -> Run:
    return lambda x: torch.cat([layer(x) for layer in layers], dim=-1)


@pytest.mark.parametrize("together", [True, False], ids=["side by side", "apart"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no residual"])
@pytest.mark.parametrize("name", LAYERS)
def test_project_is_the_modules_on_one_input(name: str, residual: bool, together: bool) -> None:
    layers = frozen(LAYERS[name]())
    if together:
        lay_side_by_side(layers)
    width = sum(len(base_of(layer).weight) for layer in layers)
    beside = tokens(2, 5, width) if residual else None

    def theirs(x: Tensor) -> Tensor:
        y = modules(layers)(x)
        return y if beside is None else beside + y

    whole = Projection(layers)
    compare(lambda x: project(x, whole, beside), theirs, tokens(), layers)


@pytest.mark.parametrize("name", LAYERS)
def test_rows_with_a_tail_give_the_same(name: str) -> None:
    layers = frozen(LAYERS[name]())
    whole, x = Projection(layers), tokens(10, WIDTH)
    answer, wide = {}, with_tail(x, whole.tail)
    wide[:, WIDTH:] = float("nan")  # nobody reads what is there before
    for kind, rows in {"plain": x, "wide": wide}.items():
        y, h = whole.forward(rows)
        dy = torch.cos(3 * y)
        if kind == "wide":
            dy = with_tail(dy, whole.tail)
            dy[:, y.shape[1] :] = float("nan")
        for parameter in trained(*layers):
            parameter.grad = None
        dx, p = whole.backward(dy)
        lora_gradients(whole.gradients(dy, rows, p, h))
        answer[kind] = [y, dx, *(p.grad for p in trained(*layers))]
    torch.testing.assert_close(answer["wide"], answer["plain"])
    assert torch.equal(wide[:, :WIDTH], x)


def test_without_an_update_rows_have_no_tail() -> None:
    assert Projection([plain(), plain()]).tail == 0


def run_of(layers: Sequence[nn.Module]) -> Run:
    whole = Projection(layers)
    return lambda x: project(x, whole)


def runs() -> dict[str, tuple[Run, list[nn.Module]]]:
    """Projections of one layer and of several, with the layers."""
    one, three = frozen(LAYERS["one"]()), frozen(LAYERS["three"]())
    apart = frozen(LAYERS["other ranks"]())
    lay_side_by_side(three)
    return {
        "one": (run_of(one), one),
        "three": (run_of(three), three),
        "apart": (run_of(apart), apart),
    }


RUNS = ("one", "three", "apart")


@pytest.mark.parametrize("name", RUNS)
def test_the_gradient_of_x_is_the_slope(name: str) -> None:
    run, _ = runs()[name]
    assert torch.autograd.gradcheck(run, tokens(1, 3, WIDTH).requires_grad_(True))


def test_the_gradient_of_a_residual_is_the_slope() -> None:
    layers = frozen(LAYERS["mixed"]())
    pair = tokens(1, 2, WIDTH), tokens(1, 2, 32)
    pair = tuple(tensor.requires_grad_(True) for tensor in pair)
    whole = Projection(layers)
    assert torch.autograd.gradcheck(lambda x, r: project(x, whole, r), pair)


@pytest.mark.parametrize("name", RUNS)
def test_the_gradients_of_the_matrices_are_the_slopes(name: str) -> None:
    run, layers = runs()[name]
    x, step = tokens(1, 3, WIDTH), 1e-6
    weight = torch.cos(3 * run(x).detach())
    _, _, *grads = answers(run, x, trained(*layers), weight)
    for parameter, grad in zip(trained(*layers), grads, strict=True):
        slopes = torch.zeros_like(grad)
        flat, place = parameter.detach().view(-1), slopes.view(-1)
        for number in range(len(flat)):
            sides = []
            for sign in (1, -1):
                before = flat[number].item()
                flat[number] = before + sign * step
                with torch.no_grad():
                    sides.append((run(x) * weight).sum())
                flat[number] = before
            place[number] = (sides[0] - sides[1]) / (2 * step)
        assert grad.abs().max() > 0.01
        torch.testing.assert_close(grad, slopes, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", RUNS)
def test_gradients_are_added_to_those_that_are_there(name: str) -> None:
    run, layers = runs()[name]
    _, _, *once = answers(run, x := tokens(), trained(*layers))
    places = [parameter.grad.data_ptr() for parameter in trained(*layers)]
    y = run(x)
    y.backward(torch.cos(3 * y.detach()))
    found = [parameter.grad for parameter in trained(*layers)]
    torch.testing.assert_close(found, [2 * grad for grad in once])
    assert [grad.data_ptr() for grad in found] == places


@pytest.mark.parametrize("name", RUNS)
def test_an_input_that_needs_no_gradient(name: str) -> None:
    run, layers = runs()[name]
    y, _, *grads = answers(run, x := tokens(), trained(*layers))
    for parameter in trained(*layers):
        parameter.grad.zero_()
    again = run(x)
    again.backward(torch.cos(3 * again.detach()))
    torch.testing.assert_close(again, y)
    torch.testing.assert_close([p.grad for p in trained(*layers)], grads)
    assert x.grad is None


@pytest.mark.parametrize("layers", [(merged,), (plain,), (plain, merged)])
def test_where_nothing_trains_there_is_no_backward_pass(layers) -> None:
    assert not run_of(frozen([build() for build in layers]))(tokens()).requires_grad


@pytest.mark.parametrize("name", RUNS)
def test_without_gradients_nothing_is_kept(name: str) -> None:
    run, layers = runs()[name]
    y, *_ = answers(run, x := tokens(), trained(*layers))
    with torch.no_grad():
        assert torch.equal(run(x), y)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("which", ["x", "dy", "a constant dy", "both"])
def test_what_is_not_contiguous(name: str, which: str) -> None:
    run, layers = runs()[name]
    x = tokens()
    dy = torch.randn_like(run(x))
    want = answers(run, x, trained(*layers), dy)
    if which == "a constant dy":  # what sum() sends back
        dy = torch.ones((), dtype=DOUBLE).expand_as(dy)
        want = answers(run, x, trained(*layers), dy.contiguous())
    if which in {"x", "both"}:
        x = x.transpose(0, 2).contiguous().transpose(0, 2)
        assert not x.is_contiguous()
    if which in {"dy", "both"}:
        dy = dy.transpose(0, 2).contiguous().transpose(0, 2)
        assert not dy.is_contiguous()
    torch.testing.assert_close(answers(run, x, trained(*layers), dy), want)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("shape", [(7, WIDTH), (1, WIDTH), (2, 3, 2, WIDTH), (0, 4, WIDTH)])
def test_any_number_of_leading_dimensions(name: str, shape: tuple[int, ...]) -> None:
    run, layers = runs()[name]
    x = tokens(*shape)
    whole = answers(run, x, trained(*layers))
    assert whole[0].shape[:-1] == shape[:-1]
    rows = answers(run, x.view(-1, 1, WIDTH), trained(*layers))
    torch.testing.assert_close(whole[2:], rows[2:])
    torch.testing.assert_close(whole[0].flatten(0, -2), rows[0].flatten(0, -2))


def test_one_by_one_convolutions_are_layers_of_pixels() -> None:
    convs = [
        randomised(LoRAConv2d(WIDTH, 8, 1, rank=4, alpha=2.0, dtype=DOUBLE)).requires_grad_(True),
        randomised(Conv2d(WIDTH, 8, 1, dtype=DOUBLE)),
    ]
    run = run_of(frozen(convs))
    picture = tokens(2, WIDTH, 3, 4).contiguous(memory_format=torch.channels_last)

    def mine(x: Tensor) -> Tensor:
        pixels = run(x.flatten(2).transpose(1, 2))
        return pixels.transpose(1, 2).unflatten(2, (3, 4))

    compare(mine, lambda x: torch.cat([conv(x) for conv in convs], dim=1), picture, convs)


def test_layers_have_views_of_the_weights() -> None:
    layers = LAYERS["three"]()
    before = [base_of(layer).weight.clone() for layer in layers]
    whole = Projection(layers)
    assert torch.equal(whole.weight, torch.cat(before))
    for layer, weight in zip(layers, before, strict=True):
        base = base_of(layer).weight
        assert torch.equal(base, weight)
        assert base.untyped_storage().data_ptr() == whole.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.lora_a.weight.data.mul_(2),
        lambda layer: layer.merge(),
        lambda layer: setattr(layer, "scale", 0.0),
        lambda layer: layer.reset_lora_parameters(),
    ],
    ids=["matrix", "merged", "strength", "reset"],
)
def test_changes_are_followed(change: Callable[[LoRALinear], object]) -> None:
    layers = frozen(LAYERS["one"]())
    run, x = run_of(layers), tokens()
    before = run(x)
    with torch.no_grad():
        change(layers[0])
        if layers[0].lora_a.weight.grad is None:
            layers[0].lora_a.weight.add_(0)  # autograd cannot see what is done to `data`
    torch.testing.assert_close(run(x), layers[0](x), rtol=1e-9, atol=1e-12)
    if not layers[0].merged:
        assert not torch.allclose(run(x), before)


def test_copies_hold_no_graph() -> None:
    # kept beyond a step, one would tie the gradients to the stream on which it was made
    copies = list(Projection(frozen([lora(), lora()])).copies())
    assert copies
    assert not any(copy.source.requires_grad or copy.target.requires_grad for copy in copies)


def test_released_layers_have_weights_of_their_own() -> None:
    layers = LAYERS["mixed"]()
    weights = [base_of(layer).weight.clone() for layer in layers]
    whole = Projection(layers)
    whole.release()
    memory = whole.weight.untyped_storage().data_ptr()
    for layer, weight in zip(layers, weights, strict=True):
        base = base_of(layer).weight
        assert torch.equal(base, weight) and base.is_contiguous()
        assert base.untyped_storage().data_ptr() != memory
        assert not isinstance(layer, LoRALayer) or layer.copied_by is None


def test_a_merged_layer_can_be_taken_apart_again() -> None:
    layers = frozen(LAYERS["three"]())
    run, x = run_of(layers), tokens()
    before = run(x)
    layers[1].merge()
    torch.testing.assert_close(run(x), before)
    layers[1].unmerge()
    assert torch.equal(run(x), before)


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shapes differ: \[\[8, 12\], \[24, 12\]\]"):
        Projection([lora(8), lora(24)])


def test_other_scales_are_refused() -> None:
    with pytest.raises(ValueError, match=r"other scales: \[0.125, 0.75\]"):
        run_of([lora(alpha=3.0), lora(alpha=0.5)])(tokens())


def test_side_by_side() -> None:
    whole = torch.randn(3, 4, 5)
    assert torch.equal(side_by_side(list(whole)), whole)
    assert side_by_side(list(whole)).data_ptr() == whole.data_ptr()
    assert torch.equal(side_by_side([whole[1]]), whole[1:2])
    assert side_by_side([whole[0], whole[2]]) is None
    assert side_by_side([whole[0], whole[0]]) is None
    assert side_by_side([whole[0], torch.randn(4, 5)]) is None
    assert side_by_side([whole[0], whole[1, :3]]) is None
    assert side_by_side([part.T for part in whole]) is None


def kept(run: Run, x: Tensor, layers: Sequence[nn.Module]) -> int:
    """How many numbers of what was computed are kept for the backward pass."""
    own = {p.untyped_storage()._cdata for layer in layers for p in layer.parameters()}
    found = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(x.requires_grad_(True))
    return sum(count for place, count in found.items() if place not in own)


@pytest.mark.parametrize("name", RUNS)
def test_only_the_input_and_what_is_narrow_is_kept(name: str) -> None:
    run, layers = runs()[name]
    x = tokens(2, 50, WIDTH)
    hidden = 100 * sum(-(-layer.rank // 8) * 8 for layer in layers)
    if name == "apart":
        hidden = 100 * 2 * 16  # the tail of each layer is as wide as the widest
    assert kept(run, x, layers) <= x.numel() + hidden


@pytest.mark.parametrize("name", RUNS)
def test_a_second_derivative_is_refused(name: str) -> None:
    run, _ = runs()[name]
    x = tokens().requires_grad_(True)
    (slope,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def relative(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    pairs = zip(found, exact, strict=True)
    return [float((one.double() - other).norm() / other.norm()) for one, other in pairs]


def test_in_bf16_it_errs_no_more_than_the_modules(device: torch.device) -> None:
    half, width = torch.bfloat16, 64
    layers = frozen([lora(width, width, 8, dtype=half).to(device) for _ in range(3)])
    theirs, mine = modules(layers), run_of(layers)
    x = tokens(2, 96, width).to(device, half)
    dy = torch.randn_like(theirs(x))
    known = answers(theirs, x, trained(*layers), dy)
    found = answers(mine, x, trained(*layers), dy)
    assert all(grad.dtype == torch.float32 for grad in found[2:])
    for layer in layers:  # both ways round the matrices, so that is not what is compared
        for part in (layer.lora_a, layer.lora_b):
            part.weight.grad = None
            part.weight.data = part.weight.data.bfloat16().double()
        layer.double()
    exact = answers(theirs, x.double(), trained(*layers), dy.double())
    ours, those = relative(found, exact), relative(known, exact)
    # where both round alike, chance decides whose error is a little larger
    assert all(one <= 1.1 * other for one, other in zip(ours, those, strict=True))

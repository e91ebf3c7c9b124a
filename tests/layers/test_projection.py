"""Projections with low-rank updates compute what plain modules do, and keep less."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eri.layers import Conv2d, LayerNorm, Linear, LoRAConv2d, LoRALinear
from eri.layers.flat import Flat
from eri.layers.lora import LoRALayer, base_of
from eri.layers.projection import Projection, feed_forward, norm_project, project, side_by_side

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
    "other widths": lambda: [lora(8), lora(24), lora(3)],
    "other ranks": lambda: [lora(rank=4), lora(rank=1)],
    "other scales": lambda: [lora(alpha=3.0), lora(alpha=0.5), lora(alpha=3.0)],
    "mixed": lambda: [plain(), lora(), plain(16), lora(16)],
    "two plain": lambda: [plain(), plain()],
    "merged": lambda: [merged()],
    "merged beside others": lambda: [lora(), merged(), lora()],
    "all merged": lambda: [merged(), merged()],
}


@torch.no_grad()
def lay_side_by_side(layers: Sequence[nn.Module]) -> None:
    """Move everything of some layers into common memory, gradients included."""
    columns = [[base_of(layer).weight for layer in layers]]
    if all(isinstance(layer, LoRALayer) for layer in layers):
        columns += [[layer.lora_a.weight for layer in layers]]
        columns += [[layer.lora_b.weight for layer in layers]]
    for parameters in columns:
        if len({p.shape for p in parameters}) > 1:
            continue
        whole = torch.stack([p.data for p in parameters])
        grads = torch.zeros_like(whole)
        for parameter, part, grad in zip(parameters, whole, grads, strict=True):
            parameter.data = part
            if parameter.requires_grad:
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


def norm_of(width: int = WIDTH, dtype=DOUBLE) -> LayerNorm:
    return randomised(LayerNorm(width, dtype=dtype)).requires_grad_(False)


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

    compare(lambda x: project(x, *layers, residual=beside), theirs, tokens(), layers)


@pytest.mark.parametrize("together", [True, False], ids=["side by side", "apart"])
@pytest.mark.parametrize("name", LAYERS)
def test_norm_project_is_a_norm_and_the_modules(name: str, together: bool) -> None:
    layers, norm = frozen(LAYERS[name]()), norm_of()
    if together:
        lay_side_by_side(layers)
    compare(
        lambda x: norm_project(x, norm, *layers),
        lambda x: modules(layers)(norm(x)),
        3 * tokens() + 1,
        layers,
    )


FEEDS = {
    "adapted": lambda: (lora(2 * 20), lora(WIDTH, 20)),
    "plain": lambda: (plain(2 * 20), plain(WIDTH, 20)),
    "inner alone": lambda: (lora(2 * 20), plain(WIDTH, 20)),
    "outer alone": lambda: (plain(2 * 20), lora(WIDTH, 20)),
    "merged inner": lambda: (merged(2 * 20), lora(WIDTH, 20)),
    "no bias": lambda: (lora(2 * 20, bias=False), lora(WIDTH, 20, bias=False)),
}


def plain_feed(norm: nn.Module, inner: nn.Module, outer: nn.Module) -> Run:
    def run(x: Tensor) -> Tensor:
        value, gate = inner(norm(x)).chunk(2, dim=-1)
        return x + outer(value * F.gelu(gate))

    return run


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("name", FEEDS)
def test_feed_forward_is_its_modules(name: str, recompute: bool) -> None:
    layers, norm = frozen(FEEDS[name]()), norm_of()
    compare(
        lambda x: feed_forward(x, norm, *layers, recompute=recompute),
        plain_feed(norm, *layers),
        3 * tokens() + 1,
        layers,
    )


def runs() -> dict[str, tuple[Run, list[nn.Module]]]:
    """Each of the functions, with its layers."""
    norm, three, feed = norm_of(), frozen(LAYERS["three"]()), frozen(FEEDS["adapted"]())
    lay_side_by_side(three)
    return {
        "project": (lambda x: project(x, *three), three),
        "norm_project": (lambda x: norm_project(x, norm, *three), three),
        "feed_forward": (lambda x: feed_forward(x, norm, *feed), feed),
        "recomputed": (lambda x: feed_forward(x, norm, *feed, recompute=True), feed),
    }


RUNS = ("project", "norm_project", "feed_forward", "recomputed")


@pytest.mark.parametrize("name", RUNS)
def test_the_gradient_of_x_is_the_slope(name: str) -> None:
    run, _ = runs()[name]
    assert torch.autograd.gradcheck(run, tokens(1, 3, WIDTH).requires_grad_(True))


def test_the_gradient_of_a_residual_is_the_slope() -> None:
    layers = frozen(LAYERS["mixed"]())
    pair = tokens(1, 2, WIDTH), tokens(1, 2, 48)
    pair = tuple(tensor.requires_grad_(True) for tensor in pair)
    assert torch.autograd.gradcheck(lambda x, r: project(x, *layers, residual=r), pair)


@pytest.mark.parametrize("name", RUNS)
def test_the_gradients_of_the_matrices_are_the_slopes(name: str) -> None:
    run, layers = runs()[name]
    x, step = tokens(1, 3, WIDTH), 1e-6
    weight = torch.cos(3 * run(x).detach())
    _, _, *grads = answers(run, x, trained(*layers), weight)
    for parameter, grad in zip(trained(*layers), grads, strict=True):
        slopes = torch.zeros_like(grad)
        flat, place = parameter.data.view(-1), slopes.view(-1)
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
    assert not project(tokens(), *frozen([build() for build in layers])).requires_grad


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
        randomised(Conv2d(WIDTH, 16, 1, dtype=DOUBLE)),
    ]
    frozen(convs)
    picture = tokens(2, WIDTH, 3, 4).contiguous(memory_format=torch.channels_last)

    def mine(x: Tensor) -> Tensor:
        pixels = project(x.flatten(2).transpose(1, 2), *convs)
        return pixels.transpose(1, 2).unflatten(2, (3, 4))

    compare(mine, lambda x: torch.cat([conv(x) for conv in convs], dim=1), picture, convs)


def count_of(layers: Sequence[nn.Module], dtype=DOUBLE) -> int:
    return len(Projection(layers, dtype).updates)


def test_layers_side_by_side_are_one_update() -> None:
    layers = LAYERS["three"]()
    assert count_of(layers) == 3
    lay_side_by_side(layers)
    assert count_of(layers) == 1
    weight = Projection(layers, DOUBLE).weight
    assert weight.data_ptr() == base_of(layers[0]).weight.data_ptr()  # not a copy
    assert count_of(layers[:2]) == 1
    assert count_of([layers[0], layers[2]]) == 2  # one lies between
    assert count_of(layers[::-1]) == 3
    layers[1].scale = 0.1
    assert count_of(layers) == 3
    layers[1].scale = layers[0].scale
    layers[1].merge()
    assert count_of(layers) == 2


def test_gradients_that_lie_apart_are_not_taken_for_one() -> None:
    layers = LAYERS["three"]()
    lay_side_by_side(layers)
    parameter = layers[1].lora_b.weight
    parameter.grad = torch.zeros_like(parameter)
    assert count_of(layers) == 3


@pytest.mark.parametrize(("rank", "count"), [(4, 1), (3, 3)], ids=["whole pieces", "with gaps"])
def test_flat_parameters_lie_side_by_side_unless_gaps_are_between(rank: int, count: int) -> None:
    layers = [lora(rank=rank, inputs=6, width=10, dtype=torch.float32) for _ in range(3)]
    with_shadows(layers, torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        assert count_of(layers, dtype) == count


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
    rows = 100
    hidden = 4 * len(layers) * rows  # what the down matrices give
    means = 0 if name == "project" else 2 * rows
    norms = 2 * WIDTH if name != "project" else 0
    inner = 2 * 20 * rows if name == "feed_forward" else 0
    assert kept(run, x, layers) <= x.numel() + hidden + means + norms + inner


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


def with_shadows(layers: Sequence[LoRALayer], dtype: torch.dtype) -> None:
    """As an adapter does it: parameters in one piece of memory, and 16-bit copies of them."""
    named = [
        (f"{part}{number}", getattr(layer, part).weight)
        for part in ("lora_a", "lora_b")
        for number, layer in enumerate(layers)
    ]
    flat = Flat(dict(named), dtype)
    shadows = flat.views(flat.shadow)
    for number, layer in enumerate(layers):
        layer.shadow(shadows[f"lora_a{number}"], shadows[f"lora_b{number}"])


def in_bf16(name: str, device: torch.device) -> tuple[list[nn.Module], Run, Run]:
    """Everything of it, its function and its modules."""
    half, width = torch.bfloat16, 64
    norm = norm_of(width, half)
    if name == "feed_forward":
        layers = [lora(2 * 128, width, 8, dtype=half), lora(width, 128, 8, dtype=half)]
    else:
        layers = [lora(width, width, 8, dtype=half) for _ in range(3)]
    whole = nn.ModuleList([norm, *frozen(layers)]).to(device)
    norm, *layers = whole
    if name == "project":
        return layers, lambda x: project(x, *layers), modules(layers)
    if name == "norm_project":
        pair = lambda x: norm_project(x, norm, *layers), lambda x: modules(layers)(norm(x))
        return [norm, *layers], *pair
    return (
        [norm, *layers],
        lambda x: feed_forward(x, norm, *layers),
        plain_feed(norm, *layers),
    )


@pytest.mark.parametrize("shadowed", [True, False], ids=["shadows", "casts"])
@pytest.mark.parametrize("name", ["project", "norm_project", "feed_forward"])
def test_in_bf16_it_errs_no_more_than_the_modules(
    device: torch.device, name: str, shadowed: bool
) -> None:
    whole, mine, theirs = in_bf16(name, device)
    layers = [module for module in whole if isinstance(module, LoRALayer)]
    x = tokens(2, 96, 64).to(device, torch.bfloat16)
    dy = torch.randn_like(theirs(x))
    known = answers(theirs, x, trained(*layers), dy)
    if shadowed:
        with_shadows(layers, torch.bfloat16)
    found = answers(mine, x, trained(*layers), dy)
    assert all(grad.dtype == torch.float32 for grad in found[2:])
    for layer in layers:  # both ways round the matrices, so that is not what is compared
        for part in (layer.lora_a, layer.lora_b):
            part.weight.grad = None
            part.weight.data = part.weight.data.bfloat16().double()
    for module in whole:
        module.double()
    exact = answers(theirs, x.double(), trained(*layers), dy.double())
    ours, those = relative(found, exact), relative(known, exact)
    # where both round alike, chance decides whose error is a little larger
    assert all(one <= 1.1 * other for one, other in zip(ours, those, strict=True))

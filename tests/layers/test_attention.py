import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eri.layers import FlashAttention, MultiHeadAttention
from eri.layers.heads import merge_heads, split_heads

KINDS = [MultiHeadAttention, FlashAttention]
Kind = type[MultiHeadAttention]
every_kind = pytest.mark.parametrize("kind", KINDS)


def reference(
    layer: MultiHeadAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> Tensor:
    """PyTorch's attention between the layer's own projections."""
    q, k, v = (
        split_heads(linear(x), layer.num_heads)
        for linear, x in ((layer.q_proj, query), (layer.k_proj, key), (layer.v_proj, value))
    )
    return layer.out_proj(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))


@every_kind
def test_c054_equals_reference(kind: Kind, device: torch.device) -> None:
    layer = kind(768, 12, device=device)
    x = torch.randn(2, 10, 768, device=device)
    y = layer(x, x, x, None, False)
    assert y.shape == (2, 10, 768)
    torch.testing.assert_close(y, reference(layer, x, x, x))


@every_kind
def test_c055_heads_must_divide_and_biases_can_go(kind: Kind) -> None:
    with pytest.raises(ValueError, match=r"embed_dim = 10 is not divisible by num_heads = 3"):
        kind(10, 3)
    names = {f"{p}_proj.weight" for p in ("q", "k", "v", "out")}
    assert set(kind(8, 2, bias=False).state_dict()) == names
    assert len(kind(8, 2).state_dict()) == 8


@every_kind
def test_c056_cross_attention(kind: Kind, device: torch.device) -> None:
    layer = kind(32, 4, device=device)
    query = torch.randn(2, 64, 32, device=device)
    key, value = torch.randn(2, 2, 77, 32, device=device)
    torch.testing.assert_close(layer(query, key, value), reference(layer, query, key, value))


@every_kind
def test_c057_bool_keeps_float_adds(kind: Kind, device: torch.device) -> None:
    layer = kind(16, 2, device=device)
    x = torch.randn(2, 6, 16, device=device)
    keep = torch.rand(6, 6, device=device) > 0.4
    keep.fill_diagonal_(True)
    added = torch.zeros(6, 6, device=device).masked_fill(~keep, -torch.inf)
    expected = reference(layer, x, x, x, keep)
    torch.testing.assert_close(layer(x, x, x, keep), expected)
    torch.testing.assert_close(layer(x, x, x, keep.int()), expected)
    torch.testing.assert_close(layer(x, x, x, added), expected)
    assert not torch.allclose(layer(x, x, x, keep.float()), expected, atol=1e-3)


@every_kind
@pytest.mark.parametrize("shape", [(6, 6), (3, 6, 6), (3, 1, 6, 6), (3, 2, 6, 6), (1, 6, 6)])
def test_c058_mask_shapes(kind: Kind, shape: tuple[int, ...], device: torch.device) -> None:
    layer = kind(16, 2, device=device)
    x = torch.randn(3, 6, 16, device=device)
    keep = torch.rand(shape, device=device) > 0.4
    keep |= torch.eye(6, dtype=torch.bool, device=device)
    whole = keep[:, None] if keep.dim() == 3 else keep
    torch.testing.assert_close(layer(x, x, x, keep), reference(layer, x, x, x, whole))


@every_kind
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (4, 7), (7, 4)])
def test_c059_causal_is_the_lower_triangle(
    kind: Kind, queries: int, keys: int, device: torch.device
) -> None:
    layer = kind(16, 2, device=device)
    query = torch.randn(2, queries, 16, device=device)
    key = torch.randn(2, keys, 16, device=device)
    triangle = torch.ones(queries, keys, dtype=torch.bool, device=device).tril()
    y = layer(query, key, key, None, True)
    torch.testing.assert_close(y, layer(query, key, key, triangle))
    later = key.clone()
    later[:, 3:] += 10
    torch.testing.assert_close(layer(query, later, later, None, True)[:, :3], y[:, :3])


@every_kind
@pytest.mark.parametrize("additive", [False, True])
def test_c060_mask_and_causal_combine(kind: Kind, additive: bool, device: torch.device) -> None:
    layer = kind(16, 2, device=device)
    x = torch.randn(2, 6, 16, device=device)
    keep = torch.rand(2, 6, 6, device=device) > 0.3
    keep |= torch.eye(6, dtype=torch.bool, device=device)
    mask = torch.zeros(2, 6, 6, device=device).masked_fill(~keep, -torch.inf) if additive else keep
    both = (keep & torch.ones(6, 6, dtype=torch.bool, device=device).tril())[:, None]
    torch.testing.assert_close(layer(x, x, x, mask, True), reference(layer, x, x, x, both))


@every_kind
@pytest.mark.parametrize("additive", [False, True])
def test_c061_a_query_that_sees_nothing_gives_zeros(
    kind: Kind, additive: bool, device: torch.device
) -> None:
    layer = kind(16, 2, device=device)
    x = torch.randn(2, 5, 16, device=device, requires_grad=True)
    keep = torch.ones(5, 5, dtype=torch.bool, device=device)
    keep[2] = False
    mask = torch.zeros(5, 5, device=device).masked_fill(~keep, -torch.inf) if additive else keep
    y = layer(x, x, x, mask)
    torch.testing.assert_close(y[:, 2], layer.out_proj.bias.expand(2, 16))
    y.sum().backward()
    gradients = [x.grad, *(weight.grad for weight in layer.parameters())]
    assert all(g is not None and g.isfinite().all() for g in gradients)


def test_c062_dropout_is_for_training_only(device: torch.device) -> None:
    layer = MultiHeadAttention(16, 2, 0.5, device=device)
    x = torch.randn(2, 6, 16, device=device)
    assert not torch.equal(layer(x, x, x), layer(x, x, x))
    layer.eval()
    torch.testing.assert_close(layer(x, x, x), reference(layer, x, x, x))


def test_c062_dropout_acts_on_the_weights() -> None:
    layer = MultiHeadAttention(8, 2, 0.5, bias=False)
    for linear in (layer.v_proj, layer.out_proj):
        torch.nn.init.eye_(linear.weight)
    x = torch.randn(1, 4, 8)
    heads = layer(x, x, torch.ones(1, 4, 8)).unflatten(-1, (2, 4))  # the sums of kept weights
    torch.testing.assert_close(heads, heads[..., :1].expand_as(heads))
    assert heads[..., 0].unique().numel() > 3


def test_c062_dropout_keeps_the_mean() -> None:
    layer = MultiHeadAttention(8, 2, 0.5)
    x = torch.randn(1, 4, 8)
    mean = torch.stack([layer(x, x, x) for _ in range(3000)]).mean(0)
    torch.testing.assert_close(mean, layer.eval()(x, x, x), atol=0.03, rtol=0)


@every_kind
def test_c063_gradients_reach_inputs_and_projections_through_a_mask(
    kind: Kind, device: torch.device
) -> None:
    layer = kind(16, 2, device=device)
    inputs = [torch.randn(2, 6, 16, device=device, requires_grad=True) for _ in range(3)]
    leaves = [*inputs, *layer.parameters()]
    mask = torch.ones(6, 6, dtype=torch.bool, device=device).tril()
    query, key, value = inputs
    y = layer(query, key, value, mask)
    g = torch.randn_like(y)
    expected = torch.autograd.grad(reference(layer, query, key, value, mask), leaves, g)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, g), expected)


def test_c064_the_two_share_call_and_state_dict() -> None:
    explicit = MultiHeadAttention(768, 12)
    flash = FlashAttention(768, 12)
    flash.load_state_dict(explicit.state_dict())
    x = torch.randn(1, 3, 768)
    one, other = (
        layer(query=x, key=x, value=x, mask=None, is_causal=False) for layer in (explicit, flash)
    )
    torch.testing.assert_close(one, other)


def test_c065_flash_refuses_dropout() -> None:
    FlashAttention(8, 2, 0.0)
    with pytest.raises(ValueError, match=r"dropout is not supported, expected 0, got 0\.1"):
        FlashAttention(8, 2, 0.1)


@pytest.mark.parametrize("head_dim", [40, 64, 80, 128, 160])
@pytest.mark.parametrize("is_causal", [False, True])
def test_c066_flash_equals_explicit_forward_and_backward(
    head_dim: int, is_causal: bool, device: torch.device
) -> None:
    explicit = MultiHeadAttention(2 * head_dim, 2, device=device)
    flash = FlashAttention(2 * head_dim, 2, device=device)
    flash.load_state_dict(explicit.state_dict())
    x = torch.randn(2, 67, 2 * head_dim, device=device, requires_grad=True)
    results = []
    for layer in (explicit, flash):
        y = layer(x, x, x, None, is_causal)
        gradients = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
        results.append((y, *gradients))
    # sums over tokens amplify rounding: compare against the size of each tensor
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm() + 1e-4


class LargestOutput(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("is_causal", [False, True])
def test_c067_no_tensor_of_flash_is_as_large_as_the_scores(is_causal: bool) -> None:
    def largest(kind: Kind) -> int:
        x = torch.randn(1, 256, 8, requires_grad=True)
        with LargestOutput() as mode:
            kind(8, 1)(x, x, x, None, is_causal).sum().backward()
        return mode.elements

    assert largest(MultiHeadAttention) == 256 * 256
    assert largest(FlashAttention) == 256 * 8


@pytest.mark.gpu
def test_c067_flash_needs_linear_memory() -> None:
    def peak_bytes(kind: Kind, length: int) -> int:
        layer = kind(64, 1, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(1, length, 64, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            layer(x, x, x)  # the libraries' workspaces are allocated now
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            layer(x, x, x)
        return torch.cuda.max_memory_allocated() - before

    explicit, flash = (
        {length: peak_bytes(kind, length) for length in (4096, 8192)}
        for kind in (MultiHeadAttention, FlashAttention)
    )
    for name, peak in (("explicit", explicit), ("flash", flash)):  # docs/benchmarks.md; with -s
        print(name, {length: f"{size / 2**20:.1f} MiB" for length, size in peak.items()})
    scores = 8192 * 8192 * 2
    assert explicit[8192] > scores
    assert flash[8192] < scores / 8
    assert flash[8192] < 2.5 * flash[4096]


@every_kind
def test_wrong_inputs_are_named(kind: Kind) -> None:
    layer = kind(8, 2)
    x = torch.zeros(2, 3, 8)
    for inputs, message in (
        ((torch.zeros(2, 3, 7), x, x), r"\[2, 3, 8\] for query, found \[2, 3, 7\]"),
        ((x, torch.zeros(1, 3, 8), x), r"\[2, 3, 8\] for key, found \[1, 3, 8\]"),
        ((x, x, torch.zeros(2, 4, 8)), r"\[2, 3, 8\] for value, found \[2, 4, 8\]"),
        ((torch.zeros(2, 8), x, x), r"for query, found \[2, 8\]"),
    ):
        with pytest.raises(ValueError, match=f"{kind.__name__}: expected .*{message}"):
            layer(*inputs)

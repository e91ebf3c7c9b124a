import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eri.layers import GELU, LayerNorm, MultiHeadAttention
from eri.models import MLP, LoRAUNetBlock, ResNetBlock, TransformerBlock, UNetConfig
from eri.models.blocks import GEGLUFeedForward, SpatialTransformer


def test_c068_resnet_block_is_the_documented_graph(device: torch.device) -> None:
    block = ResNetBlock(64, 128).to(device)
    assert block.shortcut is not None
    assert tuple(block.shortcut.weight.shape) == (128, 64, 1, 1)
    assert ResNetBlock(64, 64).shortcut is None
    x = torch.randn(2, 64, 5, 7, device=device)
    norm1 = F.group_norm(x, 32, block.norm1.weight, block.norm1.bias, 1e-5)
    h = F.conv2d(F.silu(norm1), block.conv1.weight, block.conv1.bias, padding=1)
    norm2 = F.group_norm(h, 32, block.norm2.weight, block.norm2.bias, 1e-5)
    h = F.conv2d(F.silu(norm2), block.conv2.weight, block.conv2.bias, padding=1)
    expected = F.conv2d(x, block.shortcut.weight, block.shortcut.bias) + h
    torch.testing.assert_close(block(x), expected)


def test_c068_without_a_shortcut_the_input_itself_is_added(device: torch.device) -> None:
    block = ResNetBlock(64, 64).to(device)
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    x = torch.randn(2, 64, 4, 4, device=device)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 3)])
@pytest.mark.parametrize("out", [32, 64])
def test_c070_height_and_width_are_kept(
    out: int, size: tuple[int, int], device: torch.device
) -> None:
    block = ResNetBlock(32, out).to(device)
    assert block(torch.randn(2, 32, *size, device=device)).shape == (2, out, *size)


@pytest.mark.parametrize(("channels", "out"), [(48, 64), (64, 48)])
def test_c069_channels_that_the_groups_do_not_divide_are_refused(channels: int, out: int) -> None:
    with pytest.raises(ValueError, match=r"num_channels = 48 is not divisible by num_groups = 32"):
        ResNetBlock(channels, out)


def test_d12_the_time_embedding_is_added_after_the_first_convolution(device: torch.device) -> None:
    # norm2 would take away again what is the same in a whole group, so groups are larger than 1
    block = ResNetBlock(32, 32, temb_channels=16, groups=8).to(device)
    x, temb = torch.randn(1, 32, 4, 4, device=device), torch.randn(1, 16, device=device)
    assert block.time_proj is not None
    h = block.conv1(F.silu(block.norm1(x))) + block.time_proj(F.silu(temb))[:, :, None, None]
    torch.testing.assert_close(block(x, temb), x + block.conv2(F.silu(block.norm2(h))))
    with pytest.raises(ValueError, match="pass temb"):
        block(x)


def test_c071_transformer_block_is_pre_norm_and_adds_to_the_updated_tokens(
    device: torch.device,
) -> None:
    block = TransformerBlock(32, 4).to(device)
    assert isinstance(block.attn, MultiHeadAttention)
    assert isinstance(block.mlp, MLP)
    assert TransformerBlock(32, 4, 2.0).mlp.fc1.out_features == 64
    assert isinstance(block.norm1, LayerNorm) and isinstance(block.norm2, LayerNorm)
    x = torch.randn(2, 5, 32, device=device)
    h = block.norm1(x)
    updated = x + block.attn(h, h, h)
    torch.testing.assert_close(block(x), updated + block.mlp(block.norm2(updated)))
    for layer in (block.attn.out_proj, block.mlp.fc2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    assert torch.equal(block(x), x)


def test_a133_dropout_acts_before_the_residual_is_added(device: torch.device) -> None:
    block = TransformerBlock(32, 4, dropout=1.0).to(device)
    x = torch.randn(2, 5, 32, device=device)
    kept = x + block.attn.out_proj.bias  # with every attention weight dropped
    torch.testing.assert_close(block(x), kept + block.mlp(block.norm2(kept)))
    block.eval()
    assert not torch.allclose(block(x), kept + block.mlp(block.norm2(kept)))


def test_c072_mlp(device: torch.device) -> None:
    mlp = MLP(8).to(device)
    x = torch.randn(3, 8, device=device)
    assert mlp.fc1.weight.shape == (32, 8)
    assert isinstance(mlp.act, GELU)
    hidden = F.gelu(F.linear(x, mlp.fc1.weight, mlp.fc1.bias), approximate="tanh")
    torch.testing.assert_close(mlp(x), F.linear(hidden, mlp.fc2.weight, mlp.fc2.bias))
    assert MLP(8, 20).fc2.weight.shape == (8, 20)


def test_the_second_half_of_geglu_is_the_gate_with_the_exact_gelu() -> None:
    feed_forward = GEGLUFeedForward(4)
    x = torch.randn(2, 3, 4)
    value, gate = feed_forward.proj_in(x).split(16, dim=-1)
    gelu = gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
    torch.testing.assert_close(feed_forward(x), feed_forward.proj_out(value * gelu))


def test_both_kinds_of_projection_compute_the_same() -> None:
    conv = SpatialTransformer(32, 4, 1, context_dim=8, groups=8)
    linear = SpatialTransformer(32, 4, 1, context_dim=8, groups=8, linear_projection=True)
    weights = conv.state_dict()
    for name in ("proj_in.weight", "proj_out.weight"):
        weights[name] = weights[name][:, :, 0, 0]
    linear.load_state_dict(weights)
    x, context = torch.randn(2, 32, 4, 6), torch.randn(2, 5, 8)
    torch.testing.assert_close(conv(x, context), linear(x, context))


STAGE = UNetConfig(
    in_channels=32,
    out_channels=64,
    use_attention=True,
    attention_heads=4,
    lora_rank=2,
    downsample=True,
)
BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNetBlock": (lambda: ResNetBlock(32, 64), (2, 32, 5, 6)),
    "TransformerBlock": (lambda: TransformerBlock(32, 4), (2, 5, 32)),
    "MLP": (lambda: MLP(32), (2, 5, 32)),
    "LoRAUNetBlock": (lambda: LoRAUNetBlock(STAGE), (2, 32, 5, 6)),
}


def forward_and_gradient(block: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = block(x)
    g = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, x, g)]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "sliced"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)],
    ids=str,
)
def test_dtypes_and_layouts(
    name: str, layout: str, dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    build, shape = BLOCKS[name]
    block, x = build().bfloat16(), torch.randn(shape).bfloat16()
    expected = forward_and_gradient(copy.deepcopy(block).double(), x.double())
    x = x.to(device, dtype)
    if layout == "channels last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "sliced":
        x = x.repeat_interleave(2, dim=-1)[..., ::2]
    found = forward_and_gradient(block.to(device, dtype), x)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double().cpu() - other).norm() <= tolerance * other.norm()

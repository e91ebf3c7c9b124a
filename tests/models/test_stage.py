import dataclasses
import hashlib
from itertools import product

import pytest
import torch
from torch import nn

from eri.adapters import attach
from eri.errors import ConfigError
from eri.layers import Conv2d, LoRAAttention, LoRALinear
from eri.models import LoRAUNetBlock, ResNetBlock, UNetConfig


def config(**changes: object) -> UNetConfig:
    documented = {
        "in_channels": 32,
        "out_channels": 64,
        "use_attention": True,
        "attention_heads": 4,
        "lora_rank": 2,
        "downsample": True,
    }
    return UNetConfig(**(documented | changes))  # type: ignore[arg-type]


def digest(module: nn.Module) -> str:
    """One hash over every parameter that is not an adapter's."""
    total = hashlib.sha256()
    for name, parameter in module.named_parameters():
        if "lora_" not in name:
            total.update(parameter.detach().cpu().numpy().tobytes())
    return total.hexdigest()


def test_c077_the_six_documented_fields_are_enough_and_needed() -> None:
    needed = [f.name for f in dataclasses.fields(UNetConfig) if f.default is dataclasses.MISSING]
    documented = "in_channels out_channels use_attention attention_heads lora_rank downsample"
    assert needed == documented.split()
    assert [getattr(config(), name) for name in needed] == [32, 64, True, 4, 2, True]
    with pytest.raises(TypeError):
        UNetConfig(32, 64, True, 4, 2, True)  # type: ignore[misc]


@pytest.mark.parametrize(("attention", "downsample"), list(product([True, False], repeat=2)))
def test_c078_all_four_combinations(
    attention: bool, downsample: bool, device: torch.device
) -> None:
    block = LoRAUNetBlock(config(use_attention=attention, downsample=downsample)).to(device)
    assert isinstance(block.resnet1, ResNetBlock)
    assert isinstance(block.resnet2, ResNetBlock)
    assert isinstance(block.attn, LoRAAttention) == attention
    assert isinstance(block.downsample, Conv2d) == downsample
    side = 4 if downsample else 8
    assert block(torch.randn(2, 32, 8, 8, device=device)).shape == (2, 64, side, side)


def test_c078_the_first_resnet_widens() -> None:
    block = LoRAUNetBlock(config())
    assert block.resnet1.conv1.weight.shape == (64, 32, 3, 3)
    assert block.resnet2.conv1.weight.shape == (64, 64, 3, 3)


def test_c079_a_block_gives_its_attention_width_heads_and_rank() -> None:
    attention = LoRAUNetBlock(config()).attn
    assert isinstance(attention, LoRAAttention)
    assert (attention.channels, attention.heads) == (64, 4)
    projections = (attention.to_q, attention.to_k, attention.to_v, attention.to_out)
    assert [getattr(projection, "rank", None) for projection in projections] == [2] * 4


def test_alpha_groups_and_eps_reach_the_parts() -> None:
    block = LoRAUNetBlock(config(lora_alpha=1.0, groups=16, eps=1e-3))
    assert isinstance(block.attn, LoRAAttention) and block.attn.norm is not None
    assert isinstance(block.attn.to_q, LoRALinear)
    assert block.attn.to_q.scale == 0.5
    norms = (block.resnet1.norm1, block.resnet2.norm2)
    assert {(norm.num_groups, norm.eps) for norm in norms} == {(16, 1e-3)}
    assert block.attn.norm.num_groups == 16


def test_c079_a_fresh_block_computes_what_it_computes_without_adapters(
    device: torch.device,
) -> None:
    adapted = LoRAUNetBlock(config()).to(device)
    plain = LoRAUNetBlock(config(lora_rank=None)).to(device)
    state = {name.replace(".base.", "."): p for name, p in adapted.state_dict().items()}
    plain.load_state_dict({name: p for name, p in state.items() if "lora_" not in name})
    x = torch.randn(2, 32, 8, 8, device=device)
    exactly = {"rtol": 0.0, "atol": 0.0} if device.type == "cpu" else {}  # cuDNN chooses anew
    torch.testing.assert_close(adapted(x), plain(x), **exactly)


def test_d10_the_documented_order_is_resnet_resnet_attention_downsample(
    device: torch.device,
) -> None:
    block = LoRAUNetBlock(config()).to(device)
    x = torch.randn(1, 32, 8, 8, device=device)
    by_hand = block.downsample(block.attn(block.resnet2(block.resnet1(x))))  # type: ignore[misc]
    assert torch.equal(block(x), by_hand)


def test_c080_channels_that_the_heads_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="64 is not a multiple of attention_heads 5"):
        config(attention_heads=5)


@pytest.mark.parametrize(("side", "half"), [(8, 4), (7, 4), (9, 5)])
def test_c081_downsampling_halves_rounding_up(side: int, half: int, device: torch.device) -> None:
    block = LoRAUNetBlock(config(use_attention=False)).to(device)
    assert block.downsample is not None
    assert block.downsample.weight.shape == (64, 64, 3, 3)
    assert (block.downsample.stride, block.downsample.padding) == ((2, 2), (1, 1))
    x = torch.randn(1, 32, side, side, device=device)
    assert block(x).shape[-2:] == (half, half)


def test_c082_only_the_adapters_train() -> None:
    block = LoRAUNetBlock(config())
    trained = {name for name, p in block.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in block.named_parameters() if "lora_" in name}
    assert len(trained) == 8
    assert len(list(block.trainable_parameters())) == 8


def test_c083_a_stack_learns_and_its_base_stays_as_it_is(device: torch.device) -> None:
    torch.manual_seed(0)
    stack = nn.Sequential(
        LoRAUNetBlock(config()), LoRAUNetBlock(config(in_channels=64, downsample=False))
    ).to(device)
    before = digest(stack)
    x, target = torch.randn(4, 32, 8, 8, device=device), torch.randn(4, 64, 4, 4, device=device)
    adapters = [p for p in stack.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=0.05)
    losses, moved = [], []
    for _ in range(15):
        loss = (stack(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        moved.append(sum(p.grad is not None and bool(p.grad.any()) for p in adapters))
    assert losses[-1] < 0.9 * losses[0]
    assert moved[:2] == [8, 16]  # at first the up matrices alone, then every matrix
    assert digest(stack) == before
    with torch.no_grad():
        stack[0].resnet1.conv1.bias[0] += 1e-6
    assert digest(stack) != before


def test_c084_a_stack_without_attention_has_nothing_to_train() -> None:
    def stack(attention: bool) -> nn.Sequential:
        one = config(
            use_attention=attention, lora_rank=None, transformer_depth=(0, 1), context_dim=8
        )
        return nn.Sequential(LoRAUNetBlock(one))

    with pytest.raises(ConfigError, match="nothing to train"):
        attach(stack(attention=False), rank=2)
    assert len(attach(stack(attention=True), rank=2).layers) == 8 + 2 + 2


def test_c084_a_rank_without_attention_leaves_no_trainable_parameter() -> None:
    block = LoRAUNetBlock(config(use_attention=False))
    assert list(block.trainable_parameters()) == []
    assert not any(p.requires_grad for p in block.parameters())


def test_a_block_without_rank_has_no_adapter() -> None:
    block = LoRAUNetBlock(config(lora_rank=None))
    assert not any(isinstance(module, LoRALinear) for module in block.modules())
    assert list(block.trainable_parameters()) == []


def test_an_up_stage_takes_its_skips_from_the_end_of_the_stack() -> None:
    up = LoRAUNetBlock(
        config(
            downsample=False,
            upsample=True,
            skip_channels=(16, 48),
            use_attention=False,
            groups=16,
        )
    )
    skips = [torch.zeros(1, 1, 8, 8), torch.randn(1, 48, 8, 8), torch.randn(1, 16, 8, 8)]
    assert up(torch.randn(1, 32, 8, 8), skips=skips).shape == (1, 64, 16, 16)
    assert len(skips) == 1
    with pytest.raises(ValueError, match="takes skip maps"):
        up(torch.randn(1, 32, 8, 8))


def test_a_down_stage_leaves_a_skip_of_each_layer_and_of_the_downsampling() -> None:
    skips: list[torch.Tensor] = []
    LoRAUNetBlock(config())(torch.randn(1, 32, 8, 8), skips=skips)
    assert [tuple(skip.shape[1:]) for skip in skips] == [(64, 8, 8), (64, 8, 8), (64, 4, 4)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"upsample": True}, "not both"),
        ({"skip_channels": (1,)}, "1 skip_channels for 2 layers"),
        ({"transformer_depth": (0, 1)}, "needs a context_dim"),
        ({"transformer_depth": (1,), "context_dim": 8}, "1 transformer_depths for 2 layers"),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)

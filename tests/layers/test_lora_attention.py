import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eri.layers import Linear, LoRAAttention, LoRALinear
from eri.layers.heads import merge_heads, split_heads

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")


def reference(layer: LoRAAttention, x: Tensor, context: Tensor) -> Tensor:
    q, k, v = (
        split_heads(linear(source), layer.heads)
        for linear, source in ((layer.to_q, x), (layer.to_k, context), (layer.to_v, context))
    )
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return layer.to_out(merge_heads(weights @ v))


def test_c079_documented_form_has_four_zero_updates(device: torch.device) -> None:
    layer = LoRAAttention(64, 4, 8, device=device)
    projections = [getattr(layer, name) for name in PROJECTIONS]
    assert all(isinstance(projection, LoRALinear) for projection in projections)
    assert all(projection.rank == 8 for projection in projections)
    x = torch.randn(2, 10, 64, device=device)
    plain = LoRAAttention(64, 4, device=device)
    state = {name.replace(".base", ""): value for name, value in layer.state_dict().items()}
    plain.load_state_dict({name: v for name, v in state.items() if "lora" not in name})
    assert torch.equal(layer(x), plain(x))
    trained = {name for name, weight in layer.named_parameters() if weight.requires_grad}
    assert trained == {f"{name}.lora_{part}.weight" for name in PROJECTIONS for part in "ab"}
    assert all(weight.requires_grad for weight in plain.parameters())


def test_without_rank_the_projections_are_plain() -> None:
    layer = LoRAAttention(64, 4, norm_groups=None)
    assert all(type(getattr(layer, name)) is Linear for name in PROJECTIONS)
    assert set(layer.state_dict()) == {
        "to_q.weight",
        "to_k.weight",
        "to_v.weight",
        "to_out.weight",
        "to_out.bias",
    }


def test_c080_heads_must_divide_channels() -> None:
    with pytest.raises(ValueError, match=r"channels = 64 is not divisible by heads = 5"):
        LoRAAttention(64, 5, 8)


def test_d11_tokens_give_the_attention_alone(device: torch.device) -> None:
    layer = LoRAAttention(64, 4, device=device)
    x = torch.randn(2, 10, 64, device=device)
    torch.testing.assert_close(layer(x), reference(layer, x, x))


def test_d11_a_map_is_normalised_attended_and_added_to(device: torch.device) -> None:
    layer = LoRAAttention(64, 4, 8, device=device)
    assert layer.norm is not None
    x = torch.randn(2, 64, 3, 5, device=device)
    tokens = F.group_norm(x, 32).flatten(2).mT
    expected = x + reference(layer, tokens, tokens).mT.reshape(x.shape)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("shape", [(2, 10, 64), (2, 64, 3, 5)])
def test_context_gives_keys_and_values(shape: tuple[int, ...], device: torch.device) -> None:
    layer = LoRAAttention(64, 4, context_dim=24, head_dim=8, device=device)
    assert layer.to_k.weight.shape == (32, 24)  # type: ignore[union-attr]
    x = torch.randn(shape, device=device)
    context = torch.randn(2, 7, 24, device=device)
    y = layer(x, context)
    assert y.shape == x.shape
    if x.dim() == 3:
        torch.testing.assert_close(y, reference(layer, x, context))


def test_wrong_inputs_are_named() -> None:
    layer = LoRAAttention(64, 4, context_dim=24)
    tokens = torch.zeros(2, 5, 64)
    for arguments, message in (
        ((torch.zeros(2, 5, 63),), r"\[B, T, 64\] or \[B, 64, H, W\], found \[2, 5, 63\]"),
        ((tokens, torch.zeros(2, 7, 25)), r"\[2, S, 24\] for context, found \[2, 7, 25\]"),
        ((tokens, torch.zeros(3, 7, 24)), r"\[2, S, 24\] for context, found \[3, 7, 24\]"),
        ((tokens,), r"\[2, S, 24\] for tokens of its own, found \[2, 5, 64\]"),
    ):
        with pytest.raises(ValueError, match=f"LoRAAttention: expected .*{message}"):
            layer(*arguments)
    with pytest.raises(ValueError, match="maps need norm_groups"):
        LoRAAttention(64, 4, norm_groups=None)(torch.zeros(2, 64, 3, 5))

from pathlib import Path

import pytest
import torch
from torch import Tensor

from eri.adapters import Adapter, attach, load_adapter
from eri.errors import ModelError
from eri.formats.adapter_file import Dialect, write_adapter
from eri.layers import LoRAConv2d, LoRALinear
from eri.layers.projection import side_by_side
from eri.models import UNet, load_unet
from eri.models.arrange import arrange

X, T, CONTEXT = torch.randn(2, 4, 8, 8), torch.tensor([10, 800]), torch.randn(2, 7, 32)


@torch.no_grad()
def answer(unet: UNet) -> Tensor:
    return unet(X, T, CONTEXT)


@torch.no_grad()
def randomise(adapter: Adapter) -> Adapter:
    torch.manual_seed(1)
    for name, parameter in adapter.named_parameters():
        parameter.normal_(std=0.05 if "lora_b" in name else 0.2)
    return adapter


def test_a_fresh_adapter_changes_nothing_and_detaching_puts_everything_back(sd15: Path) -> None:
    unet = load_unet(sd15)
    before, keys = answer(unet), list(unet.state_dict())
    adapter = attach(unet, rank=4)
    assert len(adapter.layers) == 192
    assert torch.equal(answer(unet), before)
    randomise(adapter)
    assert not torch.allclose(answer(unet), before, rtol=1e-3)
    adapter.detach()
    assert torch.equal(answer(unet), before)
    assert list(unet.state_dict()) == keys


def test_what_is_read_elsewhere_too_is_not_detached(sd15: Path) -> None:
    unet = load_unet(sd15).requires_grad_(False)
    before, adapter = answer(unet), randomise(attach(unet, rank=4))
    arrange(unet, lean=True)
    with pytest.raises(ValueError, match=r"arrange\(model, lean=False\) first"):
        adapter.detach()
    arrange(unet, lean=False)
    adapter.detach()
    torch.testing.assert_close(answer(unet), before)


def test_only_the_adapter_trains_and_every_adapted_layer_is_a_lora_layer(sd15: Path) -> None:
    unet = load_unet(sd15).requires_grad_(True)
    adapter = attach(unet, rank=2, alpha=1)
    trained = {id(p) for p in unet.parameters() if p.requires_grad}
    assert trained == {id(p) for p in adapter.parameters()}
    assert len(trained) == 2 * 192
    for layer in adapter.layers.values():
        assert isinstance(layer, LoRALinear | LoRAConv2d)
        assert layer.scale == 0.5


def test_gradients_reach_up_first_and_both_after_one_step(sd15: Path) -> None:
    unet = load_unet(sd15)
    adapter = attach(unet, rank=2)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    for step in range(2):
        optimizer.zero_grad()
        unet(X, T, CONTEXT).square().mean().backward()
        downs = [p for n, p in adapter.named_parameters() if "lora_a" in n]
        ups = [p for n, p in adapter.named_parameters() if "lora_b" in n]
        assert all(p.grad is not None and p.grad.any() for p in ups)
        assert all(p.grad is not None and bool(p.grad.any()) == (step > 0) for p in downs)
        optimizer.step()


def test_the_seed_decides_the_down_matrices(sd15: Path) -> None:
    def first(seed: int) -> Tensor:
        return attach(load_unet(sd15), rank=4, seed=seed).parameters()[0]

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


def test_a_second_adapter_is_refused(sd15: Path) -> None:
    unet = load_unet(sd15)
    attach(unet, rank=1)
    with pytest.raises(ValueError, match="detach it first"):
        attach(unet, rank=1)


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "peft"])
def test_a_saved_adapter_does_the_same_when_it_is_loaded(
    sd15: Path, tmp_path: Path, dialect: Dialect
) -> None:
    unet = load_unet(sd15)
    adapter = randomise(attach(unet, rank=4, alpha=2))
    expected = answer(unet)
    path = tmp_path / "adapter.safetensors"
    write_adapter(adapter.pairs(), path, dialect=dialect, dtype=torch.float32, metadata={})
    fresh = load_unet(sd15)
    loaded = load_adapter(fresh, path)
    torch.testing.assert_close(answer(fresh), expected)
    loaded.set_strength(0)
    assert torch.equal(answer(fresh), answer(load_unet(sd15)))
    loaded.set_strength(1)
    torch.testing.assert_close(answer(fresh), expected)


def test_strength_does_not_enter_what_is_saved(sd15: Path) -> None:
    adapter = randomise(attach(load_unet(sd15), rank=4, alpha=2))
    adapter.set_strength(0.3)
    assert {pair.alpha for pair in adapter.pairs().values()} == {2}


def test_state_of_another_rank_is_refused(sd15: Path) -> None:
    state = attach(load_unet(sd15), rank=4).state_dict()
    other = attach(load_unet(sd15), rank=8)
    with pytest.raises(ModelError, match="384 adapter weights differ"):
        other.load_state_dict(state)


def test_state_goes_back_in(sd15: Path) -> None:
    adapter = randomise(attach(load_unet(sd15), rank=4))
    fresh = attach(load_unet(sd15), rank=4)
    fresh.load_state_dict(adapter.state_dict())
    pairs = zip(adapter.parameters(), fresh.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_flattening_changes_no_number_and_no_name(sd15: Path) -> None:
    unet = load_unet(sd15)
    adapter = randomise(attach(unet, rank=4))
    before, names = answer(unet), [name for name, _ in adapter.named_parameters()]
    matrices = [parameter.clone() for parameter in adapter.parameters()]
    trained = [id(parameter) for parameter in adapter.parameters()]
    flat = adapter.flatten()
    assert torch.equal(answer(unet), before)
    assert [name for name, _ in adapter.named_parameters()] == names
    assert [id(parameter) for parameter in adapter.parameters()] == trained
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), matrices, strict=True))
    memory = {p.untyped_storage().data_ptr() for p in adapter.parameters()}
    assert memory == {flat.master.untyped_storage().data_ptr()}
    adapter.detach()
    assert torch.equal(answer(unet), answer(load_unet(sd15)))


def test_flat_matrices_are_all_down_and_then_all_up_in_the_models_order(sd15: Path) -> None:
    adapter = attach(load_unet(sd15), rank=4)
    flat = adapter.flatten()
    downs = [f"{name}.lora_a.weight" for name in adapter.layers]
    ups = [f"{name}.lora_b.weight" for name in adapter.layers]
    assert list(flat.parameters) == downs + ups


def test_flat_matrices_of_an_attention_lie_side_by_side(sd15: Path) -> None:
    unet = load_unet(sd15)
    adapter = attach(unet, rank=4)
    adapter.flatten()
    attentions = {name.rpartition(".")[0] for name in adapter.layers if name.endswith(".to_q")}
    assert len(attentions) == 32
    for name in attentions:
        parts = ("to_q", "to_k", "to_v") if name.endswith("attn1") else ("to_k", "to_v")
        layers = [adapter.layers[f"{name}.{part}"] for part in parts]
        for part in ("lora_a", "lora_b"):
            assert side_by_side([getattr(layer, part).weight.data for layer in layers]) is not None
            grads = [getattr(layer, part).weight.grad for layer in layers]
            assert side_by_side(grads) is not None


@pytest.mark.parametrize("first", ["arranged", "flattened"])
def test_what_is_read_elsewhere_follows(sd15: Path, first: str) -> None:
    source = randomise(attach(load_unet(sd15), rank=4))
    expected = answer(source.model)
    for load in (
        lambda target: target.load_state_dict(source.state_dict()),
        lambda target: target.load_pairs(source.pairs()),
        lambda target: overwrite(target, source),
    ):
        target = attach(load_unet(sd15), rank=4)
        if first == "arranged":
            arrange(target.model, lean=True)
        flat = target.flatten()
        if first == "flattened":
            arrange(target.model, lean=True)
        assert not torch.allclose(answer(target.model), expected, rtol=1e-3)
        load(target)
        torch.testing.assert_close(answer(target.model), expected)
        masters = flat.views(flat.master)
        for name, parameter in target.named_parameters():
            assert parameter.data_ptr() == masters[name].data_ptr()


def overwrite(target: Adapter, source: Adapter) -> None:
    """As an optimizer's kernel does it: autograd sees nothing of it."""
    for name, parameter in target.named_parameters():
        parameter.data.copy_(source.state_dict()[name])
    target.changed()

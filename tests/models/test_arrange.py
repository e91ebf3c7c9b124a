"""A U-Net arranged for training computes what it computed before, and keeps less for it."""

from functools import cache

import pytest
import torch

from eri.adapters import attach
from eri.models import load_unet
from eri.models.arrange import RECOMPUTE, arrange
from tests.families import save_sd15_real, save_sdxl


@pytest.fixture(scope="module", params=[save_sd15_real, save_sdxl], ids=["sd15", "sdxl"])
def model(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("model"))


def adapted(model, dtype=torch.float64, **settings):
    unet = load_unet(model, dtype=dtype)
    adapter = attach(unet, rank=4, alpha=2, **settings)
    draws = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():  # the up matrices, too: zeros hide errors
        parameter.data.normal_(std=0.05, generator=draws)
    return unet.train(), adapter


def inputs(unet, dtype=torch.float64, batch=2, side=8):
    draws = torch.Generator().manual_seed(2)
    spec = unet.spec
    found = [
        torch.randn(batch, spec.in_channels, side, 8, generator=draws).to(dtype),
        torch.tensor([10, 700])[:batch],
        torch.randn(batch, 77, spec.context_dim, generator=draws).to(dtype),
    ]
    if spec.pooled_dim is not None:
        found += [
            torch.randn(batch, spec.pooled_dim, generator=draws).to(dtype),
            torch.ones(batch, 6),
        ]
    return found


def run(unet, adapter, side=8):
    """The prediction and every gradient, with the bytes that were kept in between."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    for parameter in adapter.parameters():
        parameter.grad = None
    own = {p.untyped_storage()._cdata for p in unet.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = unet(*inputs(unet, unet.dtype, side=side))
    size = sum(count for storage, count in kept.items() if storage not in own)
    y.square().mean().backward()
    return y.detach(), [p.grad.clone() for p in adapter.parameters()], size


@pytest.fixture(scope="module")
def plain(model):
    """A net by its type and what it computed before anything was arranged; float32's is flat.

    It may be arranged again and again: each time says all of how it is.
    """

    @cache
    def computed(dtype):
        unet, adapter = adapted(model, dtype)
        y, grads, _ = run(unet, adapter)
        if dtype == torch.float32:
            adapter.flatten()
        return unet, adapter, y, grads

    return computed


@pytest.mark.parametrize(
    ("lean", "flat"),
    [(False, True), (True, False), (True, True)],
    ids=["plain", "lean-apart", "lean-flat"],
)
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_arranging_changes_no_number(plain, recompute, lean, flat):
    dtype = torch.float32 if flat else torch.float64
    unet, adapter, y, grads = plain(dtype)
    arrange(unet, lean=lean, recompute=recompute)
    again, grads_again, _ = run(unet, adapter)
    limit = {"rtol": 1e-3, "atol": 1e-5} if flat else {"rtol": 1e-8, "atol": 1e-12}
    torch.testing.assert_close(again, y, **limit)
    torch.testing.assert_close(grads_again, grads, **limit)


def test_each_level_keeps_less(model):
    unet, adapter = adapted(model, torch.float32)
    sizes = [run(unet, adapter, side=16)[2]]
    for recompute in RECOMPUTE:
        arrange(unet, lean=True, recompute=recompute)
        sizes.append(run(unet, adapter, side=16)[2])
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] < 0.7 * sizes[0]
    assert len(set(sizes)) == len(sizes)


def test_an_adapter_of_some_layers_only(model):
    unet, adapter = adapted(model, targets="ff+proj")
    y, grads, _ = run(unet, adapter)
    arrange(unet, lean=True)
    again, grads_again, _ = run(unet, adapter)
    torch.testing.assert_close(again, y)
    torch.testing.assert_close(grads_again, grads)


def test_the_base_model_alone(model):
    unet = load_unet(model, dtype=torch.float64).requires_grad_(False)
    y = unet(*inputs(unet))
    arrange(unet, lean=True)
    torch.testing.assert_close(unet(*inputs(unet)), y)


def test_dropout_has_no_lean_path(model):
    unet, _ = adapted(model, dropout=0.5)
    with pytest.raises(ValueError, match="dropout"):
        arrange(unet, lean=True)


def test_a_frozen_matrix_has_no_lean_path(model):
    unet, adapter = adapted(model)
    next(iter(adapter.layers.values())).lora_a.requires_grad_(False)
    with pytest.raises(ValueError, match="one is frozen"):
        arrange(unet, lean=True)


def test_what_else_trains_has_no_lean_path(model):
    unet, _ = adapted(model)
    unet.conv_in.requires_grad_(True)
    with pytest.raises(ValueError, match=r"conv_in.weight trains"):
        arrange(unet, lean=True)

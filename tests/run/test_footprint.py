from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from eri.adapters import attach
from eri.models.spec import SD15, SD15_FIELDS, SDXL, build_spec
from eri.models.unet import UNet, UNetSpec
from eri.run import footprint as module
from eri.run.footprint import Footprint, card_memory, footprint

SMALL = build_spec(
    replace(
        SD15_FIELDS,
        block_channels=(32, 64),
        layers_per_block=1,
        down_depths=((1,), (0,)),
        up_depths=((0, 0), (1, 1)),
        heads=(2, 2),
        context_dim=32,
    )
)
"""A net of two levels: the fewer the layers, the quicker the test."""


def worked_out(spec: UNetSpec, **changes: object) -> Footprint:
    given = {
        "rank": 2,
        "targets": "attn+ff+proj",
        "dropout": 0.0,
        "dtype": torch.float32,
        "latents": (2, 16, 24),
        "states": 77,
    }
    return footprint(spec, **given | changes)  # type: ignore[arg-type]


def really_kept(spec: UNetSpec, images: int, height: int, width: int) -> int:
    """Bytes that autograd keeps of a real forward pass on the CPU."""
    unet = UNet(spec)
    attach(unet, rank=2)
    unet.train()
    parameters = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    x = torch.randn(images, spec.in_channels, height, width)
    context = torch.randn(images, 77, spec.context_dim)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        loss = unet(x, torch.ones(images), context).square().mean()
    assert loss.requires_grad
    return sum(kept.values())


def test_activations_are_what_a_real_step_keeps() -> None:
    found = worked_out(SMALL).activations
    assert found == pytest.approx(really_kept(SMALL, 2, 16, 24), rel=0.02)


def test_scores_of_attention_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = worked_out(SMALL, latents=(1, 64, 64)).activations
    monkeypatch.setattr(module, "_FusedAttention", nullcontext)
    with_scores = footprint.__wrapped__(
        SMALL,
        rank=2,
        targets="attn+ff+proj",
        dropout=0.0,
        dtype=torch.float32,
        latents=(1, 64, 64),
        states=77,
    ).activations
    scores = 4 * 4096 * 4096  # one head of one block's self-attention, float32
    assert with_scores > fused + scores


def test_weights_and_adapter_are_exact() -> None:
    unet = UNet(SMALL)
    weights = sum(p.numel() for p in unet.parameters())
    matrices = sum(p.numel() for p in attach(unet, rank=2).parameters())
    found = worked_out(SMALL)
    assert found.weights == 4 * weights
    assert found.adapter == 16 * matrices
    assert found.total == found.weights + found.adapter + found.activations
    half = worked_out(SMALL, dtype=torch.bfloat16)
    assert (half.weights, half.adapter) == (2 * weights, 16 * matrices)
    assert half.activations < 0.6 * found.activations


def test_what_makes_a_step_larger_is_seen() -> None:
    base = worked_out(SMALL)
    assert worked_out(SMALL, latents=(4, 16, 24)).activations > 1.9 * base.activations
    assert worked_out(SMALL, dropout=0.5).activations > base.activations
    attention_only = worked_out(SMALL, targets="attn")
    assert attention_only.adapter < base.adapter
    assert attention_only.activations < base.activations


def test_sdxl_at_its_real_size_needs_no_memory_to_be_worked_out() -> None:
    found = worked_out(SDXL, rank=16, dtype=torch.bfloat16, latents=(4, 128, 128))
    # an H200 had reserved 34.8 GiB, of which VAE and text encoders in float32 were 3.4
    assert found.total / 2**30 == pytest.approx(34.8 - 3.4, rel=0.05)


def test_a_cpu_has_no_card() -> None:
    assert card_memory(torch.device("cpu")) is None


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")
def test_a_real_gpu_takes_what_was_worked_out() -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.device("meta"):
        unet = UNet(SD15).to(torch.bfloat16)
    unet = unet.to_empty(device="cuda")
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.fill_(0.01)
    parameters = attach(unet, rank=16).parameters()
    unet.train()
    optimizer = torch.optim.AdamW(parameters)
    x = torch.randn(2, 4, 64, 64, device="cuda", dtype=torch.bfloat16)
    context = torch.randn(2, 77, 768, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        unet(x, torch.ones(2, device="cuda"), context).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    peak = torch.cuda.max_memory_allocated() - before
    found = worked_out(SD15, rank=16, dtype=torch.bfloat16, latents=(2, 64, 64))
    assert found.total == pytest.approx(peak, rel=0.05)
    assert card_memory(torch.device("cuda")) > peak  # type: ignore[operator]

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from eri.adapters import attach
from eri.models.arrange import RECOMPUTE, Recompute, arrange
from eri.models.spec import SD15, SD15_FIELDS, SDXL, build_spec
from eri.models.unet import UNet, UNetSpec
from eri.run import footprint as module
from eri.run.footprint import Footprint, footprint

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


WIDE = build_spec(
    replace(
        SD15_FIELDS,
        block_channels=(320, 640),
        layers_per_block=1,
        down_depths=((1,), (0,)),
        up_depths=((0, 0), (1, 1)),
        heads=(5, 10),
    )
)
"""The same, with the proportions of a real one."""


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


def really_taken(lean: bool, recompute: Recompute) -> int:
    """Bytes that PyTorch's allocator gave in a real step on the CPU, at the most."""
    unet = UNet(SMALL)
    attach(unet, rank=2).flatten()
    arrange(unet.train(), lean=lean, recompute=recompute)
    inputs = torch.randn(2, 4, 32, 48), torch.ones(2), torch.randn(2, 77, 32)
    unet(*inputs).square().mean().backward()
    with torch.profiler.profile(profile_memory=True) as profile:
        unet(*inputs).square().mean().backward()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()  # type: ignore[attr-defined]
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("lean", [True, False])
def test_activations_are_what_a_real_step_takes(lean: bool, recompute: Recompute) -> None:
    found = worked_out(SMALL, latents=(2, 32, 48), lean=lean, recompute=recompute).activations
    taken = really_taken(lean, recompute)
    # a CPU's GroupNorm leaves maps pixel by pixel; a GPU's, which is counted, copies them
    assert taken * 0.999 < found < taken * (1.001 if lean else 1.1)


def test_scores_of_attention_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = worked_out(SMALL, latents=(1, 64, 64)).activations
    monkeypatch.setattr(module, "fused_attention", nullcontext)
    monkeypatch.setattr(module, "recall", lambda *_: None)
    with_scores = footprint(
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


def test_it_is_worked_out_once_for_each_code_of_the_net(monkeypatch: pytest.MonkeyPatch) -> None:
    first = worked_out(SMALL)
    monkeypatch.setattr(module, "_on_meta", None)  # what cannot be recalled fails now
    assert worked_out(SMALL) == first
    monkeypatch.setattr(module, "_code", lambda: "another net")
    with pytest.raises(TypeError):
        worked_out(SMALL)


def test_weights_and_adapter_are_exact() -> None:
    unet = UNet(SMALL)
    weights = sum(p.numel() for p in unet.parameters())
    matrices = sum(p.numel() for p in attach(unet, rank=2).parameters())
    found = worked_out(SMALL)
    assert found.weights == 4 * weights
    assert found.adapter == pytest.approx(16 * matrices, rel=0.001)  # each begins at 8 numbers
    assert found.total == found.resident + found.activations
    assert found.resident == found.weights + found.adapter
    half = worked_out(SMALL, dtype=torch.bfloat16)
    assert half.weights == 2 * weights
    assert half.adapter == pytest.approx(16 * matrices, rel=0.001)
    assert half.activations < 0.6 * found.activations


def test_copies_of_the_matrices_are_the_adapters() -> None:
    plain, lean = (
        worked_out(SMALL, rank=8, dtype=torch.bfloat16, lean=lean) for lean in (False, True)
    )
    assert lean.weights == plain.weights
    per_matrix = 16 * lean.adapter / plain.adapter
    assert 18 < per_matrix < 20.5  # bytes: A is copied once, B twice, and few lie between
    narrow = worked_out(SMALL, rank=2, dtype=torch.bfloat16, lean=True)  # copies are as wide
    assert lean.adapter - plain.adapter == narrow.adapter - worked_out(SMALL, rank=2).adapter


def test_what_makes_a_step_larger_is_seen() -> None:
    base = worked_out(SMALL)
    assert worked_out(SMALL, latents=(4, 16, 24)).activations > 1.9 * base.activations
    assert worked_out(SMALL, dropout=0.5).activations > base.activations
    attention_only = worked_out(SMALL, targets="attn")
    assert attention_only.adapter < base.adapter
    assert attention_only.activations < base.activations


@pytest.mark.parametrize("lean", [True, False])
def test_each_way_to_compute_more_takes_less(lean: bool) -> None:
    taken = [
        worked_out(WIDE, latents=(1, 64, 64), lean=lean, recompute=way).activations
        for way in RECOMPUTE
    ]
    assert taken[0] > taken[1] > max(taken[2:])
    assert not lean or taken[2] > taken[3]  # a plain block holds as much for a moment


def test_activations_grow_with_images_and_their_area() -> None:
    def taken(images: int, height: int, width: int, lean: bool) -> int:
        shape = {"latents": (images, height, width), "dtype": torch.bfloat16, "rank": 16}
        return worked_out(WIDE, lean=lean, **shape).activations

    for lean in (True, False):
        one = taken(1, 64, 64, lean)
        assert taken(4, 64, 64, lean) == pytest.approx(4 * one, rel=0.03)
        assert taken(4, 64, 64, lean) <= 4 * one
        assert taken(1, 96, 128, lean) == pytest.approx(3 * one, rel=0.03)


def sdxl(images: int, *, lean: bool, recompute: Recompute = "nothing") -> float:
    """GiB for images of 1024x1024."""
    shape = {"latents": (images, 128, 128), "dtype": torch.bfloat16, "rank": 16}
    return worked_out(SDXL, lean=lean, recompute=recompute, **shape).total / 2**30


def test_sdxl_at_its_real_size_needs_no_memory_to_be_worked_out() -> None:
    # an H200 had reserved 34.8 GiB, of which VAE and text encoders in float32 were 3.4
    assert sdxl(4, lean=False) == pytest.approx(34.8 - 3.4, rel=0.05)
    assert sdxl(4, lean=True) < 22
    assert sdxl(4, lean=True, recompute="blocks") < 8.5


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("lean", [True, False])
def test_a_real_gpu_takes_what_was_worked_out(lean: bool, recompute: Recompute) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.device("meta"):
        unet = UNet(SD15).to(torch.bfloat16)
    unet = unet.to_empty(device="cuda")
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.fill_(0.01)
    flat = attach(unet, rank=16).flatten()
    arrange(unet.train(), lean=lean, recompute=recompute)
    torch.cuda.reset_peak_memory_stats()  # the layout was copied
    x = torch.randn(2, 4, 64, 64, device="cuda", dtype=torch.bfloat16)
    context = torch.randn(2, 77, 768, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        unet(x, torch.ones(2, device="cuda"), context).float().square().mean().backward()
    peak = torch.cuda.max_memory_allocated() - before
    found = worked_out(
        SD15,
        rank=16,
        dtype=torch.bfloat16,
        latents=(2, 64, 64),
        lean=lean,
        recompute=recompute,
    )
    assert flat.master.isfinite().all()
    assert found.total == pytest.approx(peak, rel=0.05)

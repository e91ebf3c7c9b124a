"""SD1.5's and SDXL's U-Nets at their real size compute what diffusers computes; on a GPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eri.models import load_unet
from tests.full_size import random_unet, save_single_file

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Path]]:
    """diffusers' net and the single file of it."""
    unet = random_unet(request.param, "cuda")
    path = tmp_path_factory.mktemp(request.param) / "unet.safetensors"
    yield unet, save_single_file(unet, path)
    path.unlink()


def inputs(spec: Any) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    side = spec.sample_size
    x = torch.randn(2, 4, side, side, device="cuda")
    context = torch.randn(2, 77, spec.context_dim, device="cuda")
    added = {}
    if spec.pooled_dim is not None:
        pooled = torch.randn(2, spec.pooled_dim, device="cuda")
        ids = torch.tensor([[1024.0, 768, 0, 131, 1024, 1024]] * 2, device="cuda")
        added = {"text_embeds": pooled, "time_ids": ids}
    return x, torch.tensor([7, 901], device="cuda"), context, added


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


@torch.no_grad()
def test_the_output_is_that_of_diffusers(
    both: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    theirs, path = both
    theirs.float()
    ours = load_unet(path, device="cuda")
    x, t, context, added = inputs(ours.spec)
    expected = theirs(x, t, context, added_cond_kwargs=added).sample
    error = relative(ours(x, t, context, *added.values()), expected)
    del ours
    half = load_unet(path, dtype=torch.bfloat16, device="cuda")
    x2, context2 = x.bfloat16(), context.bfloat16()
    added2 = {name: v.bfloat16() if name == "text_embeds" else v for name, v in added.items()}
    error_ours = relative(half(x2, t, context2, *added2.values()), expected)
    theirs.bfloat16()
    error_theirs = relative(theirs(x2, t, context2, added_cond_kwargs=added2).sample, expected)
    print(
        f"\n{half.spec.family}: float32 {error:.2e}; "
        f"bfloat16 {error_ours:.5f}, diffusers' own {error_theirs:.5f}"
    )
    assert error < 1e-5
    assert error_ours <= 1.02 * error_theirs

from pathlib import Path

import pytest
import torch
from torch import Tensor

from eri.adapters import layer_shapes, load_adapter
from eri.formats.adapter_file import write_adapter
from eri.models import load_unet
from eri.models.unet import sinusoid
from tests.pairs import random_pair


def relative(mine: Tensor, theirs: Tensor) -> float:
    return ((mine - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("size", [(8, 8), (8, 16), (16, 8)])
def test_computes_what_diffusers_computes(sd15: Path, size: tuple[int, int]) -> None:
    from diffusers import UNet2DConditionModel

    ours = load_unet(sd15)
    theirs = UNet2DConditionModel.from_pretrained(sd15 / "unet")
    x, t, context = torch.randn(3, 4, *size), torch.tensor([0, 500, 999]), torch.randn(3, 7, 32)
    with torch.no_grad():
        expected = theirs(x, t, context).sample
        assert relative(ours(x, t, context), expected) < 1e-5
        ours.mid.layers[0].resnet.conv1.weight[0, 0] += 0.1  # the comparison notices one kernel
        assert relative(ours(x, t, context), expected) > 1e-5


def test_a_gradient_reaches_every_weight(sd15: Path) -> None:
    unet = load_unet(sd15).requires_grad_(True)
    unet(torch.randn(1, 4, 8, 8), torch.tensor([10]), torch.randn(1, 5, 32)).sum().backward()
    without = [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_the_spec_says_what_it_is(sd15: Path) -> None:
    spec = load_unet(sd15).spec
    assert spec.family == "sd15"
    assert (spec.divisor, spec.context_dim, spec.sample_size) == (8, 32, 8)
    assert (len(spec.down), len(spec.up)) == (4, 4)


def test_with_an_adapter_on_every_layer_it_is_still_told_and_used(
    sd15: Path, tmp_path: Path
) -> None:
    unet = load_unet(sd15, dtype=torch.bfloat16)
    torch.manual_seed(0)
    pairs = {
        name: random_pair(shape, rank=2, alpha=0.1) for name, shape in layer_shapes(unet).items()
    }
    assert "conv_in" in pairs
    path = tmp_path / "a.safetensors"
    write_adapter(pairs, path, dialect="kohya", metadata={})
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([300]), torch.randn(1, 7, 32)
    inputs = x.bfloat16(), t, context.bfloat16()
    with torch.no_grad():
        plain = unet(*inputs)
        adapter = load_adapter(unet, path)
        assert adapter.layers.keys() == pairs.keys()
        assert (unet.dtype, unet.device) == (torch.bfloat16, torch.device("cpu"))
        adapted = unet(*inputs)
    assert adapted.isfinite().all()
    assert relative(adapted.float(), plain.float()) > 0.1


@pytest.mark.parametrize(
    ("x", "context", "message"),
    [
        ((1, 4, 12, 8), (1, 5, 32), "12x8 cannot be halved evenly; .* multiples of 8"),
        ((1, 3, 8, 8), (1, 5, 32), r"\[1, 3, 8, 8\], expected \[B, 4, H, W\]"),
        ((1, 4, 8, 8), (1, 5, 31), r"\[1, 5, 31\], expected \[B, S, 32\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    sd15: Path, x: tuple[int, ...], context: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_unet(sd15)(torch.zeros(x), torch.tensor([0]), torch.zeros(context))


def test_sinusoids_are_those_of_diffusers() -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    values = torch.tensor([0, 1, 77, 999])
    expected = get_timestep_embedding(values, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(sinusoid(values, 64), expected)


def test_bf16_stays_near_fp32(sd15: Path) -> None:
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([300]), torch.randn(1, 7, 32)
    half = load_unet(sd15, dtype=torch.bfloat16)
    with torch.no_grad():
        answer = half(x.bfloat16(), t, context.bfloat16())
        assert answer.dtype == torch.bfloat16
        assert relative(answer.float(), load_unet(sd15)(x, t, context)) < 0.05

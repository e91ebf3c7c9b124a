"""Every family computes what diffusers computes, from a folder and from a single file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from eri.models import load_unet, load_vae
from eri.models.unet import UNet, sinusoid
from tests.families import save_sd15_real, save_sd21, save_sdxl, single_file

FAMILIES = {"sd15": save_sd15_real, "sd21": save_sd21, "sdxl": save_sdxl}
SSD_1B = {
    "transformer_layers_per_block": [0, [2, 2], [1, 1]],
    "reverse_transformer_layers_per_block": [[1, 1, 3], [2, 1, 1], 0],
    "mid_block_type": "UNetMidBlock2D",
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES[family](tmp_path_factory.mktemp(family) / "model")


@pytest.fixture(params=["folder", "single file"])
def model(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Path:
    if request.param == "folder":
        return folder
    return single_file(folder, tmp_path / "model.safetensors", loose=True, ema=True)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def outputs(ours: UNet, theirs: Any) -> tuple[Tensor, Tensor]:
    """What both nets say of the same random input."""
    torch.manual_seed(1)
    spec = ours.spec
    x = torch.randn(2, spec.in_channels, 16, 8)
    t = torch.tensor([7, 901])
    context = torch.randn(2, 77, spec.context_dim)
    pooled = ids = added = None
    if spec.pooled_dim is not None:
        pooled = torch.randn(2, spec.pooled_dim)
        ids = torch.tensor([[1024, 768, 0, 128, 1024, 1024], [512, 512, 7, 0, 640, 384]])
        added = {"text_embeds": pooled, "time_ids": ids}
    with torch.no_grad():
        expected = theirs(x, t, context, added_cond_kwargs=added).sample
        return ours(x, t, context, pooled, ids), expected


def test_the_unet_is_that_of_diffusers(model: Path, folder: Path, family: str) -> None:
    ours = load_unet(model)
    assert ours.spec.family == family
    found, expected = outputs(ours, UNet2DConditionModel.from_pretrained(folder / "unet"))
    assert relative(found, expected) < 1e-5


def test_the_comparison_notices_other_heads(folder: Path, family: str, tmp_path: Path) -> None:
    """Nothing in the weights says how many heads there are."""
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet", attention_head_dim=2)
    found, expected = outputs(load_unet(folder), theirs)
    assert relative(found, expected) > 1e-4


def test_size_ids_are_embedded_as_by_diffusers() -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    sizes = torch.tensor([1024.0, 768, 0, 131, 1024, 1])
    expected = get_timestep_embedding(sizes, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert relative(sinusoid(sizes, 256), expected) < 1e-5


def test_the_vae_is_that_of_diffusers(model: Path, folder: Path, family: str) -> None:
    theirs: Any = AutoencoderKL.from_pretrained(folder / "vae")
    ours = load_vae(model, family=family)  # type: ignore[arg-type]
    assert ours.scale == theirs.config.scaling_factor
    torch.manual_seed(2)
    images = torch.rand(2, 3, 64, 32) * 2 - 1
    with torch.no_grad():
        latent = theirs.encode(images).latent_dist
        mean, std = ours.encode(images)
        assert relative(mean, latent.mean * ours.scale) < 1e-5
        assert relative(std, latent.std * ours.scale) < 1e-5
        decoded = theirs.decode(latent.mean).sample.clamp(-1, 1)
        assert relative(ours.decode(mean), decoded) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"unet": "bare", "without": ["vae", "text"]},
        {"unet": "diffusers", "without": ["vae", "text"]},
        {"dtype": torch.float64},
        {"markers": ["v_pred", "ztsnr"], "metadata": {"modelspec.title": "[红] a (b)"}},
    ],
    ids=["bare names", "names of diffusers", "another type", "markers and metadata"],
)
def test_every_naming_of_a_unet_is_the_same_net(
    folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    path = single_file(folder, tmp_path / "名 [x] (y).safetensors", **change)
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet")
    found, expected = outputs(load_unet(path), theirs)
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("naming", ["bare", "vae.", "diffusers", "old_diffusers"])
def test_every_naming_of_a_vae_is_the_same_net(folder: Path, tmp_path: Path, naming: Any) -> None:
    path = single_file(folder, tmp_path / "vae.safetensors", vae=naming, without=["unet", "text"])
    with pytest.raises(ValueError, match="pass family="):
        load_vae(path)
    ours = load_vae(path, family="sd15")
    theirs: Any = AutoencoderKL.from_pretrained(folder / "vae")
    torch.manual_seed(3)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = theirs.encode(images).latent_dist.mean * ours.scale
    assert relative(ours.encode(images)[0], expected) < 1e-5


def test_sd2_with_convolutions_around_its_transformers(tmp_path: Path) -> None:
    folder = save_sd21(tmp_path / "model")
    path = single_file(folder, tmp_path / "model.safetensors", conv_projections=True)
    ours = load_unet(path)
    assert ours.spec.family == "sd21"
    found, expected = outputs(ours, UNet2DConditionModel.from_pretrained(folder / "unet"))
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("as_file", [False, True], ids=["folder", "single file"])
def test_a_shallower_sdxl_is_told_by_its_own_depths(tmp_path: Path, as_file: bool) -> None:
    folder = save_sdxl(tmp_path / "model", **SSD_1B)
    model = single_file(folder, tmp_path / "m.safetensors") if as_file else folder
    ours = load_unet(model)
    assert ours.spec.family == "sdxl"
    assert ours.spec.mid.attend == (False,)
    assert [stage.transformer_depth for stage in ours.spec.up] == [(1, 1, 3), (2, 1, 1), (0, 0, 0)]
    found, expected = outputs(ours, UNet2DConditionModel.from_pretrained(folder / "unet"))
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize(
    ("save", "channels"),
    [(save_sd15_real, 9), (save_sd15_real, 8), (save_sdxl, 9)],
    ids=["sd15 inpainting", "sd15 pix2pix", "sdxl inpainting"],
)
def test_unets_with_more_inputs_load(
    tmp_path: Path, save: Callable[..., Path], channels: int
) -> None:
    folder = save(tmp_path / "model", in_channels=channels)
    path = single_file(folder, tmp_path / "m.safetensors")
    ours = load_unet(path)
    assert ours.spec.in_channels == channels
    found, expected = outputs(ours, UNet2DConditionModel.from_pretrained(folder / "unet"))
    assert relative(found, expected) < 1e-5

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eri.models import load_vae, vae


def test_latents_and_images_are_those_of_diffusers(sd15: Path) -> None:
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(sd15 / "vae")
    ours = load_vae(sd15)
    assert (ours.factor, ours.scale) == (8, 0.18215)
    images = torch.rand(2, 3, 64, 128) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
        mean, std = ours.encode(images)
        assert mean.shape == (2, 4, 8, 16)
        torch.testing.assert_close(mean, posterior.mean * 0.18215)
        torch.testing.assert_close(std, posterior.std * 0.18215)
        decoded = theirs.decode(mean / 0.18215).sample.clamp(-1, 1)
        torch.testing.assert_close(ours.decode(mean), decoded)


def test_it_is_frozen(sd15: Path) -> None:
    vae = load_vae(sd15)
    assert not any(p.requires_grad for p in vae.model.parameters())
    assert not vae.encode(torch.zeros(1, 3, 64, 64))[0].requires_grad


def out_of_memory_above(pixels: int, model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets a VAE's encoder run out of memory for more pixels than that; the sizes it was asked."""
    sizes: list[int] = []
    encode: Callable[[Tensor], Tensor] = model.encoder.forward

    def limited(images: Tensor) -> Tensor:
        sizes.append(images.shape[-2] * images.shape[-1])
        if sizes[-1] > pixels:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(images)

    monkeypatch.setattr(model.encoder, "forward", limited)
    return sizes


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(vae, "TILE", 32)
    return 32 * 32


def theirs_tiled(model: Any) -> Any:
    """Diffusers' own tiling, with tiles of 32 pixels."""
    model.tile_sample_min_size, model.tile_latent_min_size = 32, 4
    model.enable_tiling()
    return model


@torch.no_grad()
def test_tiles_are_those_of_diffusers_and_are_off_again_afterwards(
    sd15_real: Path, small_tiles: int
) -> None:
    from diffusers import AutoencoderKL

    ours = load_vae(sd15_real)
    theirs = theirs_tiled(AutoencoderKL.from_pretrained(sd15_real / "vae"))
    images = torch.rand(1, 3, 32, 64) * 2 - 1
    mean, std = ours.encode(images, tiled=True)
    posterior = theirs.encode(images).latent_dist
    torch.testing.assert_close(mean, posterior.mean * ours.scale)
    torch.testing.assert_close(std, posterior.std * ours.scale)
    decoded = theirs.decode(mean / ours.scale).sample.clamp(-1, 1)
    torch.testing.assert_close(ours.decode(mean, tiled=True), decoded)
    theirs.disable_tiling()
    whole, _ = ours.encode(images)
    assert not torch.allclose(whole, mean, atol=1e-3)
    torch.testing.assert_close(whole, theirs.encode(images).latent_dist.mean * ours.scale)


def test_an_image_is_encoded_in_tiles_only_when_memory_asks(
    sd15_real: Path, small_tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = load_vae(sd15_real)
    images = torch.rand(1, 3, 32, 64) * 2 - 1
    whole, tiled = ours.encode(images), ours.encode(images, tiled=True)
    mean, std, in_tiles = ours.encode_within_memory(images)
    assert not in_tiles
    assert torch.equal(torch.cat([mean, std]), torch.cat(whole))
    sizes = out_of_memory_above(small_tiles, ours.model, monkeypatch)
    mean, std, in_tiles = ours.encode_within_memory(images)
    assert in_tiles
    assert torch.equal(torch.cat([mean, std]), torch.cat(tiled))
    assert sizes[0] == 2 * small_tiles
    assert max(sizes[1:]) == small_tiles


@pytest.mark.parametrize("width", [32, 64])
def test_memory_for_less_than_a_tile_is_an_error(
    sd15_real: Path, small_tiles: int, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    ours = load_vae(sd15_real)
    sizes = out_of_memory_above(small_tiles // 2, ours.model, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        ours.encode_within_memory(torch.zeros(1, 3, 32, width))
    assert len(sizes) == (1 if width == 32 else 2)  # one tile is not tried twice
    assert not ours.model.use_tiling


def test_it_moves_to_a_device_and_images_follow(sd15: Path) -> None:
    ours = load_vae(sd15)
    assert ours.to("meta") is ours
    assert ours.encode(torch.zeros(1, 3, 64, 64))[0].device.type == "meta"

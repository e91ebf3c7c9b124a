from pathlib import Path

import torch

from eri.models import load_vae


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

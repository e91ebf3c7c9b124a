"""Cached latents against diffusers: the same cut, made with Pillow alone, encoded by theirs."""

from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from eri.data import Cut, Item, Shape, View, cache_latents
from eri.data.cuts import PLAIN, UNIT
from eri.models import load_vae


def theirs(folder: Path, image: Image.Image) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of an image as diffusers' own pipelines would take it."""
    from diffusers import AutoencoderKL
    from diffusers.image_processor import VaeImageProcessor

    vae = AutoencoderKL.from_pretrained(folder / "vae")
    pixels = VaeImageProcessor(do_resize=False).preprocess(image)
    with torch.no_grad():
        posterior = vae.encode(pixels, return_dict=False)[0]
    scale = vae.config["scaling_factor"]
    return posterior.mean[0] * scale, posterior.std[0] * scale


def picture(path: Path) -> Image.Image:
    """A photo-like picture of 384 x 288, upright, from a JPEG that lies on its side."""
    random = np.random.default_rng(5)
    coarse = random.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    upright = Image.fromarray(coarse).resize((384, 288), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise to be seen
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)
    return ImageOps.exif_transpose(Image.open(path)).convert("RGB")


# view -> the cut of 64 x 96 by hand: the size that 384 x 288 is scaled to, and the corner. The
# scales are exact in binary: of others, Pillow rounds one byte in thousands another way.
CUTS: dict[str, tuple[View, tuple[int, int], tuple[int, int]]] = {
    "middle": (PLAIN, (96, 72), (0, 4)),
    "flipped": (PLAIN._replace(flip=True), (96, 72), (0, 4)),
    "bottom": (PLAIN._replace(down=UNIT), (96, 72), (0, 8)),
    "zoomed right": (PLAIN._replace(zoom=UNIT, down=0, across=UNIT), (192, 144), (96, 0)),
    "unscaled, flipped": (View(True, 3 * UNIT, UNIT // 4, 0), (384, 288), (0, 56)),
}


@pytest.mark.parametrize("family", ["sd15_real", "sdxl"])
def test_cached_latents_are_those_of_diffusers(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(family)
    image = picture(tmp_path / "a.jpg")
    assert image.size == (384, 288)
    digest = sha256((tmp_path / "a.jpg").read_bytes()).hexdigest()
    item = Item(
        path=tmp_path / "a.jpg", captions=("x",), width=384, height=288, sha256=digest, source=0
    )
    vae = load_vae(folder)
    cuts = [Cut(item, Shape(64, 96), view) for view, _, _ in CUTS.values()]
    latents = cache_latents(cuts, vae.encode_within_memory, encoder=family)
    again = cache_latents(cuts, vae.encode_within_memory, encoder=family)
    for n, (view, size, (left, top)) in enumerate(CUTS.values()):
        scaled = image.resize(size, Image.Resampling.LANCZOS)
        by_hand = scaled.crop((left, top, left + 96, top + 64))
        mean, std = theirs(folder, ImageOps.mirror(by_hand) if view.flip else by_hand)
        assert mean.shape == (4, 8, 12)
        for latent in (latents[n], again[n]):
            torch.testing.assert_close(latent.mean, mean, atol=1e-5, rtol=0)
            torch.testing.assert_close(latent.std, std, atol=1e-5, rtol=0)

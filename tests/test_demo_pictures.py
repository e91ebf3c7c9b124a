"""The demo model draws what it is asked for, and the demo pictures are what their script draws."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eri.diffusion import NoiseSchedule, Sampler
from eri.run.base import look_at
from eri.run.encoding import Reader
from eri.run.preview import Painter

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "eri" / "demo"
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")


@pytest.mark.parametrize("sampler", ["dpmpp_2m_karras", "euler"])
def test_the_model_draws_the_colour_it_is_asked_for_on_white(sampler: Sampler) -> None:
    facts, cpu = look_at("demo"), torch.device("cpu")
    painter = Painter(
        unet=facts.load_unet(dtype=torch.float32, device=cpu),
        vae=facts.load_vae(),
        schedule=NoiseSchedule(),
        sampler=sampler,
        steps=10,
        guidance=5.0,
        seed=0,
    )
    prompts = ["green heart", "blue heart, drawn chalk style", "large red circle"]
    with Reader(facts, dtype=torch.float32, device=cpu) as reader:
        guides = [reader.guide(prompt, "") for prompt in prompts]
    for strongest, both in zip((1, 2, 0), guides, strict=True):
        picture = painter.paint(*both, size=128, number=0)
        pixels = np.asarray(picture).astype(float)
        assert pixels[50:80, 50:80].mean((0, 1)).argmax() == strongest
        assert pixels[:12, :12].mean() > 240


def test_the_held_out_subjects_are_in_the_same_style() -> None:
    styles = {
        caption.read_text(encoding="utf-8").split(", ")[1]
        for folder in ("data", "validation")
        for caption in (DEMO / folder).glob("*.txt")
    }
    assert styles == {"painted ink style\n"}


def difference(one: Path, other: Path) -> float:
    """Mean over the levels of two pictures; infinite for two captions that differ."""
    if one.suffix == ".txt":
        return 0 if one.read_bytes() == other.read_bytes() else float("inf")
    pixels = [np.asarray(Image.open(path).convert("RGB"), int) for path in (one, other)]
    return np.abs(pixels[0] - pixels[1]).mean()


@pytest.mark.skipif(not FONT.is_file(), reason="no Noto Color Emoji here")
def test_the_pictures_are_what_the_script_draws(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "scripts/draw_demo_data.py", tmp_path], cwd=ROOT, check=True)
    for folder in ("data", "validation"):
        drawn = {path.name: path for path in (tmp_path / folder).iterdir()}
        shipped = {path.name: path for path in (DEMO / folder).iterdir() if path.suffix != ".md"}
        assert drawn.keys() == shipped.keys()
        for name, path in shipped.items():
            assert difference(path, drawn[name]) < 2

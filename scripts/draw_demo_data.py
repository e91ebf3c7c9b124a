"""Draws the demo data set: emoji as washes of blue ink on paper, each with its caption.

    python scripts/draw_demo_data.py eri/demo

Writes data/ and validation/ with one PNG of 128x128 and one .txt a subject. Needs the font of
`emoji_pictures`. The demo base model knows the subjects, but draws them in their own colours.
"""

from pathlib import Path

import numpy as np
import typer
from emoji_pictures import draw_all
from PIL import Image, ImageFilter

STYLE = "painted ink style"
TRAINING = (
    "airplane, ambulance, anchor, automobile, bell, bicycle, bird, butterfly, camera, cat face, "
    "cherries, crown, elephant, evergreen tree, fish, four leaf clover, hammer, house building, "
    "ice cream, key, mushroom, pear, penguin, sailboat, snail, spouting whale, strawberry, "
    "sunflower, teapot, trophy, umbrella, violin"
).split(", ")
VALIDATION = (
    "banana, dog face, guitar, honeybee, octopus, rocket, steam locomotive, turtle"
).split(", ")
PAPER = np.array([250, 247, 238])
INK = np.array([(8, 20, 84), (26, 62, 168), (104, 146, 224), (222, 233, 248)])  # dark to thin
INK_AT = (0.0, 0.35, 0.7, 1.0)
COLOURS = 96  # of the saved palette: keeps a file under 12 KB


def blurred(channel: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur of a picture [H, W] in 0..1."""
    picture = Image.fromarray((channel * 255).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), np.float64) / 255


def inked(emoji: np.ndarray) -> np.ndarray:
    """An RGBA emoji [128, 128, 4] as an ink wash that is darker at edges: RGB [128, 128, 3]."""
    alpha = emoji[..., 3] / 255
    brightness = emoji[..., :3] @ np.array([0.3, 0.59, 0.11]) / 255
    down, right = np.gradient(6 * blurred(alpha, 2) + 6 * blurred(brightness * alpha, 1))
    edges = np.clip(0.5 * np.hypot(down, right), 0, 1)
    tone = np.clip(0.15 + 0.78 * brightness - 0.55 * edges, 0, 1)
    ink = np.stack([np.interp(tone, INK_AT, channel) for channel in INK.T], -1)
    picture = ink * alpha[..., None] + PAPER * (1 - alpha[..., None])
    return picture.round().astype(np.uint8)


def main(demo: Path) -> None:
    """Draw the pictures and write the captions of both folders."""
    emoji = draw_all()
    for folder, subjects in (("data", TRAINING), ("validation", VALIDATION)):
        (demo / folder).mkdir(parents=True, exist_ok=True)
        for subject in subjects:
            stem = demo / folder / subject.replace(" ", "-")
            picture = Image.fromarray(inked(emoji[subject]))
            few_colours = picture.quantize(COLOURS, dither=Image.Dither.NONE)
            few_colours.save(stem.with_suffix(".png"), optimize=True)
            stem.with_suffix(".txt").write_text(f"{subject}, {STYLE}\n", "utf-8")


if __name__ == "__main__":
    typer.run(main)

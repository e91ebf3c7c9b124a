"""Curves in a picture: by matplotlib where it is installed, else plainly by Pillow."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = ("#1f5fbf", "#e07b00", "#2c8c4a", "#a03060")
WIDTH, HEIGHT, MARGIN = 640, 400, 56

Curves = Mapping[str, Sequence[float]]
"""Values by step, by what they are of."""


def plot(panels: Mapping[str, Curves], path: Path, *, below: str) -> None:
    """Draw panels side by side.

    Args:
        panels: curves by title.
        path: of the PNG.
        below: what the horizontal axis is.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        _plainly(panels, path, below=below)
        return
    figure = Figure(figsize=(6.4 * len(panels), 4), layout="constrained")
    for place, (title, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), place)
        for number, (name, values) in enumerate(curves.items()):
            style = {"color": COLOURS[number % len(COLOURS)], "lw": 3 - 1.5 * min(number, 1)}
            axes.plot(range(1, len(values) + 1), values, label=name, **style)
        axes.set_title(title)
        axes.set_xlabel(below)
        axes.set_ylabel("loss")
        axes.legend()
    figure.savefig(path, dpi=110)


def _plainly(panels: Mapping[str, Curves], path: Path, *, below: str) -> None:
    picture = Image.new("RGB", (WIDTH * len(panels), HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    for place, (title, curves) in enumerate(panels.items()):
        _panel(draw, place * WIDTH, title, curves, below)
    picture.save(path)


def _panel(draw: ImageDraw.ImageDraw, x0: int, title: str, curves: Curves, below: str) -> None:
    values = [value for curve in curves.values() for value in curve]
    low, high = min(values), max(values)
    span = high - low or 1.0
    left, right, top, bottom = x0 + MARGIN, x0 + WIDTH - 16, 32, HEIGHT - MARGIN
    draw.rectangle((left, top, right, bottom), outline="black")
    draw.text((left, 12), title, fill="black")
    draw.text((left, HEIGHT - 24), below, fill="black")
    draw.text((x0 + 4, top), f"{high:.4f}", fill="black")
    draw.text((x0 + 4, bottom - 10), f"{low:.4f}", fill="black")
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        across = (right - left) / max(len(curve) - 1, 1)
        points = [
            (left + across * step, bottom - (bottom - top) * (value - low) / span)
            for step, value in enumerate(curve)
        ]
        draw.line(points, fill=colour, width=3 - 2 * min(number, 1))
        draw.text((right - 160, top + 8 + 14 * number), name, fill=colour)

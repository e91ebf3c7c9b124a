"""Previews: the same prompts from the same noise, drawn again while the adapter learns."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from eri.adapters import Adapter
from eri.data import Shape
from eri.diffusion import NoiseSchedule, Sampler, sample
from eri.files import atomic_write, disk_errors
from eri.models.unet import UNet
from eri.models.vae import VAE
from eri.rng import normal
from eri.run.conditions import Condition, Conditions, stack
from eri.run.micro_batch import size_tensor
from eri.run.sheet import contact_sheet

__all__ = ["Painter", "Previews", "save_png"]

DRAWN_WITH = "parameters"  # the text chunk that UIs read: prompt and settings


@dataclass(frozen=True)
class Painter:
    """Draws prompts with a base model and whatever adapter is attached to it."""

    unet: UNet
    vae: VAE
    schedule: NoiseSchedule
    sampler: Sampler
    steps: int
    guidance: float
    seed: int
    tiled: bool = False  # whether the VAE decodes in tiles: less memory, and slightly other numbers

    def paint(
        self, prompt: Condition, negative: Condition, *, size: int, number: int
    ) -> Image.Image:
        """Draw one picture; it depends on the seed and its number, not on other pictures.

        SDXL is told that it is of a whole image of this size, not of a part of a larger one.

        Args:
            prompt: its condition.
            negative: the condition of the negative prompt, with as many text states.
            size: side in pixels, a multiple of what the U-Net can halve.
            number: of the picture among those of the seed.
        """
        unet = self.unet
        both = stack(unet, [negative, prompt], [size_tensor(size, size, Shape(size, size))] * 2)
        side = size // self.vae.factor
        noise = normal((unet.spec.in_channels, side, side), self.seed, "preview", samples=[number])
        was_training = unet.training
        unet.eval()
        try:
            latent = sample(
                lambda x, t: self._guided(x, t, both),
                noise.to(unet.device),
                self.schedule,
                sampler=self.sampler,
                steps=self.steps,
            )
        finally:  # training goes on where a preview ran out of memory
            unet.train(was_training)
        try:
            pixels = (self.vae.to(unet.device).decode(latent, self.tiled)[0].float() + 1) * 127.5
        finally:
            self.vae.to("cpu")
        levels = pixels.round().clamp(0, 255).to(torch.uint8)
        return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())

    def _guided(self, x: Tensor, t: Tensor, both: Conditions) -> Tensor:
        """Classifier-free guidance: Ho and Salimans, arXiv 2207.12598, equation 6."""
        twice = torch.cat([x, x]).to(self.unet.dtype)
        without, given = self.unet(twice, torch.cat([t, t]), *both).float().chunk(2)
        return without + self.guidance * (given - without)


@dataclass(frozen=True)
class Previews:
    """The previews of a run: the same prompts at every step, one PNG for each."""

    painter: Painter
    adapter: Adapter
    prompts: Sequence[str]
    negative_prompt: str
    conditions: Sequence[tuple[Condition, Condition]]  # of each prompt and its negative one
    size: int  # side in pixels
    folder: Path

    def draw(self, step: int, stop: Callable[[], bool]) -> list[Image.Image]:
        """The pictures of a step: those on the disk that were drawn like this, and the missing.

        Step 0 is the base model, whatever the adapter has learned since.

        Args:
            step: that the adapter has reached, or 0.
            stop: asked before each picture; what is not drawn yet then stays undrawn.
        """
        drawn_by = "none" if step == 0 else _hash_of(self.adapter)
        self.adapter.set_strength(0.0 if step == 0 else 1.0)
        pictures = []
        try:
            for number in range(len(self.prompts)):
                if stop():
                    break
                pictures.append(self._picture(step, number, drawn_by))
        finally:
            self.adapter.set_strength(1.0)
        return pictures

    def sheet(
        self, step: int, examples: Sequence[Image.Image], stop: Callable[[], bool]
    ) -> Path | None:
        """Put training images, the base model's pictures and those of a step on one sheet.

        Returns:
            Where it is; None when it was asked to stop.
        """
        before, after = self.draw(0, stop), self.draw(step, stop)
        if stop():
            return None
        rows = [("trained on", examples), ("before", before), ("after", after)]
        path = self.folder / "before-after.png"
        save_png(contact_sheet(rows, self.prompts), path)
        return path

    def _picture(self, step: int, number: int, drawn_by: str) -> Image.Image:
        path = self.folder / f"{step:06}-{number + 1}.png"
        drawn_with = f"{self._describe(number)}, Adapter hash: {drawn_by}"
        picture = _read(path, drawn_with)
        if picture is None:
            prompt, negative = self.conditions[number]
            picture = self.painter.paint(prompt, negative, size=self.size, number=number)
            save_png(picture, path, drawn_with)
        return picture

    def _describe(self, number: int) -> str:
        painter = self.painter
        return (
            f"{self.prompts[number]}\nNegative prompt: {self.negative_prompt}\n"
            f"Steps: {painter.steps}, Sampler: {painter.sampler}, "
            f"CFG scale: {painter.guidance:g}, Seed: {painter.seed}, Number: {number}, "
            f"Size: {self.size}x{self.size}"
        )


def _hash_of(adapter: Adapter) -> str:
    """Of its weights: a run that went back some steps comes by the same step with others."""
    digest = hashlib.sha256()
    for name, tensor in adapter.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def save_png(picture: Image.Image, path: Path, drawn_with: str = "") -> None:
    """Write a picture, whole or not at all, with a text that says how it was drawn."""
    text = PngInfo()
    if drawn_with:
        text.add_itxt(DRAWN_WITH, drawn_with)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        picture.save(file, format="PNG", pnginfo=text)


def _read(path: Path, drawn_with: str) -> Image.Image | None:
    """A picture of ours, if it was drawn in this way."""
    if not path.is_file():
        return None
    with Image.open(path, formats=["PNG"]) as picture:
        return picture.convert("RGB") if picture.info.get(DRAWN_WITH) == drawn_with else None

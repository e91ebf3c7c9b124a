"""Compares base models in eri with the same files in diffusers, and trains a little on each.

    scripts/verify-real FILE…             makes .venv first; or, where eri is installed:
    python scripts/verify_real.py FILE…

A FILE is a whole model: a safetensors file or a folder of diffusers. Each becomes a row of a
Markdown table. The errors in it are relative, ‖eri − diffusers‖ / ‖diffusers‖, in float32. What
could not be compared is never passed over: the row says so, and the command ends with 1.
"""

import gc
import math
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import diffusers
import numpy as np
import torch
import transformers
import typer
from diffusers_side import DiffusersSide, first_line
from PIL import Image
from short_run import export_both, short_run
from torch import Tensor

import eri
from eri.adapters import load_adapter
from eri.errors import EriError
from eri.models import load_text, load_unet, load_vae
from eri.printable import printable
from eri.run.base import BaseFacts, look_at
from eri.run.device import choose_device
from eri.run.inspect import inspect_path

PICTURE = Path(eri.__file__).parent / "demo/data/teapot.png"
PROMPTS = (  # without `!`, with which diffusers' tokenizers of SD2 and SDXL fill prompts up
    "a photo of a cat in the snow, highly detailed",
    "score_9, score_8_up, 1girl, (blue) hair: café, naïve; 5 o'clock",
    "",
    "a caption that is longer than what is read of it, " * 10,
)
LARGEST_ERROR = 1e-4  # of what a net computes
LARGEST_ADAPTER_ERROR = 1e-2  # of what an adapter changes, which is small itself
COLUMNS = (
    *("file", "what it is", "prediction", "U-Net", "VAE in", "VAE out", "text", "pooled"),
    *("training", "kohya", "diffusers", "result"),
)


@dataclass
class Row:
    """A row of the table, and what is wrong or worth knowing, in sentences."""

    name: str
    cells: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def measured(self, column: str, error: float, largest: float) -> None:
        """Write an error; one that is too large, or is no number, is a problem."""
        said = f"{error:.0e}" if error else "0"
        self.cells[column] = said
        if not error <= largest:  # a NaN is not
            self.failed(column, f"the error {said} is more than {largest:.0e}", f"FAILED {said}")

    def failed(self, column: str, why: str, cell: str = "FAILED") -> None:
        """Write that something is wrong."""
        self.cells[column] = cell
        self.problems.append(f"{column}: {why}")

    def markdown(self) -> str:
        """The row."""
        self.cells["result"] = "NOT VERIFIED" if self.problems else "ok"
        return line([self.name, *(self.cells.get(column, "–") for column in COLUMNS[1:])])


def line(cells: Sequence[str]) -> str:
    """Cells as a line of a Markdown table."""
    return f"| {' | '.join(printable(cell, limit=200).replace('|', '/') for cell in cells)} |"


def main(
    files: Annotated[list[Path], typer.Argument(help="Models: safetensors files or folders.")],
    *,
    steps: Annotated[int, typer.Option(min=0, help="Of training; 0 compares only.")] = 50,
    resolution: Annotated[int, typer.Option(min=64, help="Of training, in pixels.")] = 256,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="For all of it.")] = "auto",
    keep: Annotated[bool, typer.Option("--keep", help="Keep the runs and the adapters.")] = False,
) -> None:
    """Compare base models with diffusers and train on them; print a Markdown table."""
    where = choose_device() if device == "auto" else torch.device(device)
    torch.backends.cudnn.allow_tf32 = False  # float32 is to be float32 on both sides
    work = Path(tempfile.mkdtemp(prefix="eri-verify-"))
    rows = []
    try:
        for number, file in enumerate(files):
            verification = Verification(file, where, work / str(number), steps, resolution)
            rows.append(verification.row())
    finally:
        if keep:
            print(f"kept: {work}", file=sys.stderr)
        else:
            shutil.rmtree(work)
    print(report(rows, where, steps, resolution))
    raise typer.Exit(any(row.problems for row in rows))


def report(rows: Sequence[Row], device: torch.device, steps: int, resolution: int) -> str:
    """The table with what it was made by, and below it what was wrong."""
    card = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    versions = ", ".join(
        f"{module.__name__} {module.__version__}"
        for module in (eri, diffusers, transformers, torch)
    )
    trained = f"{steps} steps at {resolution}²" if steps else "no training"
    said = [f"{row.name}: {text}" for row in rows for text in (*row.problems, *row.notes)]
    return "\n".join(
        (
            f"{versions}; {device.type} ({card}); {trained}",
            "",
            line(COLUMNS),
            line(["---"] * len(COLUMNS)),
            *(row.markdown() for row in rows),
            *(("", *(f"- {printable(text, limit=600)}" for text in said)) if said else ()),
        )
    )


@dataclass
class Verification:
    """All that is tried on one model."""

    path: Path
    device: torch.device
    folder: Path
    steps: int
    resolution: int

    def row(self) -> Row:
        """Try everything, one part in memory at a time."""
        row = Row(printable(self.path.name or str(self.path)))
        try:
            facts = look_at(str(self.path.absolute()))
            self._tell(row, inspect_path(facts.path))
        except EriError as error:
            row.failed("what it is", first_line(error))
            return row
        row.notes += facts.notes
        side = DiffusersSide(facts, self.device, self.folder / "configs")
        self._compare(row, facts, side)
        if self.steps:
            self._train(row, facts, side)
        row.notes += side.notes
        return row

    def _tell(self, row: Row, inspected: dict[str, Any]) -> None:
        types = inspected["dtype"]["unet"]
        types = types if isinstance(types, str) else "+".join(types)
        row.cells["what it is"] = (
            f"{inspected['family']}: {inspected['structure']}; {inspected['layout']}, "
            f"{inspected['names']} names, {types}"
        )
        row.cells["prediction"] = str(inspected["prediction"])
        row.notes.append(f"prediction told by: {inspected.get('told by', 'nothing')}")

    def _compare(self, row: Row, facts: BaseFacts, side: DiffusersSide) -> None:
        inputs, image = unet_inputs(facts, self.device), self._picture()
        self._part(row, ("U-Net",), lambda: side.unet(inputs), lambda: our_unet(facts, inputs))
        self._part(
            row, ("VAE in", "VAE out"), lambda: side.vae(image), lambda: our_vae(facts, image)
        )
        self._part(
            row,
            ("text", "pooled")[: len(facts.text)],
            lambda: side.text(PROMPTS),
            lambda: our_text(facts, self.device),
        )

    def _train(self, row: Row, facts: BaseFacts, side: DiffusersSide) -> None:
        self._say(f"{self.steps} steps of training")
        try:
            run = short_run(facts.path, self.folder, self.steps, self.resolution, self.device)
            row.cells["training"] = f"exit 0, loss {run.first_loss:.3f} → {run.last_loss:.3f}"
            row.notes += (f"eri train: {said}" for said in run.said)
            adapters = export_both(run, self.folder)
        except (EriError, ValueError) as error:
            row.failed("training", first_line(error))
            for column in ("kohya", "diffusers"):
                row.failed(column, "there is no adapter to compare", "not compared")
            return
        inputs = unet_inputs(facts, self.device)
        self._part(
            row,
            ("kohya", "diffusers"),
            lambda: side.adapters(adapters, inputs),
            lambda: our_adapters(facts, adapters, inputs),
            largest=LARGEST_ADAPTER_ERROR,
        )

    def _part(
        self,
        row: Row,
        columns: Sequence[str],
        theirs: Callable[[], list[Tensor]],
        ours: Callable[[], list[Tensor]],
        *,
        largest: float = LARGEST_ERROR,
    ) -> None:
        """Compute something in diffusers, then in eri, and write the errors into columns."""
        self._say(", ".join(columns))
        try:
            with torch.no_grad():
                expected = theirs()
        except Exception as error:  # noqa: BLE001 - whatever it is, the row says so
            why = f"not compared, diffusers fails: {first_line(error)}"
            for column in columns:
                row.failed(column, why, "not compared")
            return
        tidy()
        try:
            with torch.no_grad():
                found = ours()
        except Exception as error:  # noqa: BLE001 - as above
            for column in columns:
                row.failed(column, first_line(error))
            return
        for column, mine, other in zip(columns, found, expected, strict=True):
            row.measured(column, relative(mine, other), largest)

    def _picture(self) -> Tensor:
        """One of the bundled pictures, [1, 3, H, W] in [-1, 1]."""
        side = self.resolution // 64 * 64
        with Image.open(PICTURE) as image:
            pixels = np.asarray(image.convert("RGB").resize((side, side)), np.float32)
        return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None].to(self.device)

    def _say(self, what: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {printable(self.path.name)}: {what}", file=sys.stderr)


def tidy() -> None:
    """Give back the memory of diffusers' part, which holds itself in circles, before ours comes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; infinite where the shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


def unet_inputs(facts: BaseFacts, device: torch.device) -> list[Tensor]:
    """Latents, timesteps and text states, and SDXL's pooled text and size ids: random ones."""
    spec = facts.spec
    draw = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(2, spec.in_channels, 4 * spec.divisor, 2 * spec.divisor, generator=draw),
        torch.tensor([20, 900]),
        torch.randn(2, 77, spec.context_dim, generator=draw),
    ]
    if spec.pooled_dim is not None:
        sizes = [[1024.0, 768, 0, 128, 1024, 1024], [512, 512, 7, 0, 640, 384]]
        inputs += [torch.randn(2, spec.pooled_dim, generator=draw), torch.tensor(sizes)]
    return [tensor.to(device) for tensor in inputs]


def our_unet(facts: BaseFacts, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The U-Net's answer."""
    return [load_unet(facts.path, device=inputs[0].device)(*inputs)]


def our_vae(facts: BaseFacts, image: Tensor) -> list[Tensor]:
    """As `DiffusersSide.vae`."""
    vae = load_vae(facts.vae_path, device=image.device, family=facts.spec.family)
    mean, deviation = vae.encode(image)
    return [torch.cat([mean, deviation]), vae.decode(mean)]


def our_text(facts: BaseFacts, device: torch.device) -> list[Tensor]:
    """As `DiffusersSide.text`."""
    context, pooled = load_text(facts.text_path, device=device).encode(PROMPTS)
    return [context] if pooled is None else [context, pooled]


def our_adapters(
    facts: BaseFacts, adapters: Sequence[Path], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """As `DiffusersSide.adapters`."""
    unet = load_unet(facts.path, device=inputs[0].device)
    base = unet(*inputs)
    changes = []
    for file in adapters:
        adapter = load_adapter(unet, file)
        changes.append(unet(*inputs) - base)
        adapter.detach()
    return changes


if __name__ == "__main__":
    typer.run(main)

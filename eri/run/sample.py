"""`eri sample`: pictures from a base model, with or without an adapter."""

from dataclasses import dataclass
from pathlib import Path

from eri.adapters import load_adapter
from eri.config import ModelSource, load_config
from eri.diffusion import Sampler
from eri.errors import ConfigError
from eri.formats.header import read_header
from eri.formats.prediction_hints import file_hint
from eri.layers.backend import set_backend
from eri.printable import printable
from eri.run.adapter_files import CONFIG, find_adapter
from eri.run.base import BaseFacts, look_at
from eri.run.device import choose_device, choose_dtype
from eri.run.encoding import Reader
from eri.run.folder import refuse_existing
from eri.run.memory import memory_errors
from eri.run.prediction import Choice, choose, schedule_of
from eri.run.preview import Painter, save_png
from eri.run.sheet import contact_sheet

__all__ = ["Drawing", "draw"]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What to draw, and with what."""

    model: ModelSource  # a base model, or a run, whose model and adapter are used
    adapter: Path | None  # a file, a run or a checkpoint; None: the model's own if it is a run
    strength: float  # of the adapter
    prompts: tuple[str, ...]
    negative: str
    sampler: Sampler
    steps: int
    guidance: float
    seed: int
    size: int | None  # side in pixels; None: the model's own


def draw(drawing: Drawing, output: Path, *, overwrite: bool = False) -> str:
    """Draw one picture for each prompt; several come on one sheet.

    By PyTorch's own operations: no kernels are built for a picture.

    Returns:
        A line that says what was written.

    Raises:
        OccupiedError: the output exists.
        ConfigError: a size that the model cannot draw, or an output that is no PNG.
    """
    if output.suffix.lower() not in {"", ".png"}:
        raise ConfigError(
            f"pictures are written as PNG, not as {printable(output.suffix)}",
            where=printable(output),
            hint="give it a name that ends in .png",
        )
    refuse_existing(output, overwrite)
    model, adapter = _model_and_adapter(drawing)
    facts = look_at(model)
    choice = _choice(facts, adapter)
    size = drawing.size or facts.resolution
    if size % facts.step:
        raise ConfigError(
            f"--size {size} is not a multiple of {facts.step}, as this model needs",
            where=facts.name,
        )
    device = choose_device()
    dtype = choose_dtype("auto", device)
    set_backend("reference")
    with memory_errors():
        with Reader(facts, dtype=dtype, device=device) as reader:
            guides = [reader.guide(prompt, drawing.negative) for prompt in drawing.prompts]
        unet = facts.load_unet(dtype=dtype, device=device)
        if adapter is not None:
            load_adapter(unet, adapter).set_strength(drawing.strength)
        painter = Painter(
            unet=unet,
            vae=facts.load_vae(),
            schedule=schedule_of(facts.noise, choice),
            sampler=drawing.sampler,
            steps=drawing.steps,
            guidance=drawing.guidance,
            seed=drawing.seed,
        )
        pictures = [
            painter.paint(*both, size=size, number=number) for number, both in enumerate(guides)
        ]
    one = len(pictures) == 1
    save_png(pictures[0] if one else contact_sheet([("", pictures)], drawing.prompts), output)
    count = "1 picture" if one else f"{len(pictures)} pictures"
    return f"{printable(output)}: {count} of {size}x{size}\n{_taken_for(choice)}"


def _model_and_adapter(drawing: Drawing) -> tuple[ModelSource, Path | None]:
    run = Path(drawing.model.path)
    adapter = None if drawing.adapter is None else find_adapter(drawing.adapter)
    if not (run / CONFIG).is_file():
        return drawing.model, adapter
    return load_config(run / CONFIG).model, adapter or find_adapter(run)


def _taken_for(choice: Choice) -> str:
    """What the model was drawn as; here what the files do not tell is not measured."""
    if choice.target.source == "unknown":
        return f"{choice.line}; taken for {choice.prediction}, --prediction sets it"
    if choice.zero.source == "unknown":
        return f"{choice.line}; taken for none, --zero-terminal-snr sets it"
    return choice.line


def _choice(facts: BaseFacts, adapter: Path | None) -> Choice:
    """What the model is taken for: what is set, what its files say, what its adapter says."""
    hint = facts.hint
    if hint is None and adapter is not None and adapter.is_file():
        hint = file_hint(read_header(adapter), adapter)
    return choose(facts.source, hint)

"""The command line: parse, call, print. Nothing heavy is imported before a command needs it."""

import math
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn, cast

import typer
from rich.console import Console
from rich.text import Text

from eri import __version__
from eri.config import Config, ModelSource, load_config, make_config
from eri.errors import ConfigError, EriError, Stopped
from eri.files import Outlet, disk_errors, open_standard_streams
from eri.printable import printable

__all__ = ["app", "main", "set_environment"]

app = typer.Typer(
    name="eri",
    help="LoRA fine-tuning of UNet diffusion models: SD1.5, SD2.x, SDXL and their like.",
    pretty_exceptions_enable=False,
    add_completion=False,
)


out = Console(highlight=False)

WRITES_FILES = ("train", "init", "export-lora", "sample")
"""Commands that are done when their file is written, whether or not anybody reads what they say."""

UsageError = cast(type[Exception], typer.BadParameter.__base__)
"""What every refused command line raises; typer exports only this subclass of it."""


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _shared(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of every command are read in `main`."""


@app.command()
def train(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML file; see configs/ and eri init.")
    ] = None,
    *,
    model: Annotated[
        str | None, typer.Option(help="Without a file: demo, a file, a folder or a hub id.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Without a file: a folder of images; repeatable.")
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Without a file: the folder of the run; runs/<data folder>.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, as train.steps=100."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, stop.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew, in a new folder beside the old run.")
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help="Go on although this setting changed since the run began."
        ),
    ] = None,
) -> None:
    """Train a LoRA, from a file or from --model and --data; again to go on with a run."""
    settings = _settings(config, model, data or [], output=output, overrides=set_ or [])
    from eri.run.folder import hold

    with hold(settings, restart=restart, dry_run=dry_run) as (held, stop):
        from eri.run.train import train_held  # takes seconds; the folder is locked before

        changes = frozenset(allow_change or ())
        train_held(held, out, stop, dry_run=dry_run, allow_change=changes)


@app.command()
def init(
    data: Annotated[str, typer.Argument(help="A folder of images with their captions.")],
    model: Annotated[
        str, typer.Option(help="The base model: demo, a file, a folder or a hub id.")
    ] = "demo",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write; <data folder>.yaml.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Write a short config with a comment on each setting, to begin with."""
    from eri.run.start import init as write

    _say(write(data, model=model, output=output, overwrite=overwrite))


@app.command("export-lora")
def export_lora(
    source: Annotated[Path, typer.Argument(help="A run, a checkpoint or an adapter file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    format_: Annotated[
        Literal["kohya", "diffusers", "peft"],
        typer.Option("--format", help="kohya is for A1111 and ComfyUI; peft writes a folder."),
    ] = "kohya",
    dtype: Annotated[
        Literal["fp16", "bf16", "fp32"], typer.Option(help="Type of the numbers.")
    ] = "fp16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Write an adapter for another program, and read it back to be sure."""
    from eri.run.export import export

    _say(export(source, output, dialect=format_, precision=dtype, overwrite=overwrite))


@app.command()
def inspect(
    target: Annotated[Path, typer.Argument(help="An adapter, a base model, a run, a checkpoint.")],
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a file or a folder is and whether it is sound."""
    from eri.run.inspect import as_json, as_text, inspect_path

    facts = inspect_path(target)
    if json_:
        typer.echo(as_json(facts))
    else:
        _say(as_text(facts))


@app.command()
def sample(
    model: Annotated[
        str, typer.Argument(help="A run, or a base model: demo, a file, a folder or a hub id.")
    ],
    *,
    prompt: Annotated[
        list[str],
        typer.Option("--prompt", "-p", help="What to draw; (a cat:1.2) is a weight; repeatable."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The PNG to write.")],
    adapter: Annotated[Path | None, typer.Option(help="An adapter for the base model.")] = None,
    strength: Annotated[
        float, typer.Option(callback=_finite, help="Of the adapter; 1 is as trained.")
    ] = 1.0,
    negative: Annotated[str, typer.Option(help="What to avoid.")] = "",
    sampler: Annotated[
        Literal["dpmpp_2m_karras", "euler"], typer.Option(help="Method that draws.")
    ] = "dpmpp_2m_karras",
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Sampling steps.")] = 25,
    guidance: Annotated[
        float,
        typer.Option(min=0, max=100, help="Classifier-free guidance scale."),
    ] = 5.0,
    seed: Annotated[int, typer.Option(help="Of the first noise.")] = 0,
    size: Annotated[
        int | None, typer.Option(min=64, help="Side in pixels; the model's own.")
    ] = None,
    vae: Annotated[str | None, typer.Option(help="Another VAE for the base model.")] = None,
    text: Annotated[str | None, typer.Option(help="A model whose text encoders are used.")] = None,
    prediction: Annotated[
        Literal["auto", "epsilon", "v"], typer.Option(help="What the base model predicts.")
    ] = "auto",
    zero_terminal_snr: Annotated[
        Literal["auto", "yes", "no"], typer.Option(help="Whether its last timestep is pure noise.")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Draw pictures with a base model, with or without an adapter."""
    zero_snr = {"auto": "auto", "yes": True, "no": False}[zero_terminal_snr]
    base_model = _base_model(
        path=model, vae=vae, text=text, prediction=prediction, zero_terminal_snr=zero_snr
    )
    from eri.run.sample import Drawing, draw

    drawing = Drawing(
        model=base_model,
        adapter=adapter,
        strength=strength,
        prompts=tuple(prompt),
        negative=negative,
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        seed=seed,
        size=size,
    )
    _say(draw(drawing, output, overwrite=overwrite))


@app.command()
def doctor() -> None:
    """Say what this machine offers, and what to mend."""
    from eri.run.doctor import doctor as look

    facts, problems = look()
    _say("\n".join(facts))
    for problem in problems:
        _say(f"problem: {problem}")
    _say(f"{len(problems)} problems found" if problems else "everything is in order")


def set_environment() -> None:
    """What libraries read from the environment, before any of them is imported."""
    # OpenMP's threads would wait for each other spinning, and crawl wherever something else runs
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # PyTorch would keep pieces of a GPU's memory that fit nothing any more
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ and sys.platform != "win32":
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def main() -> NoReturn:
    """Run the command line and leave with the exit code of the contract."""
    from eri.run.stop import StopSignals, leave_on_signals

    leave_on_signals()
    output, _ = open_standard_streams()
    set_environment()
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"] or ["--help"]
    try:
        with StopSignals(remembered=0):
            code = app(args=arguments, prog_name="eri", standalone_mode=False)
        _require_written(output, arguments)
        sys.exit(code)
    except UsageError as error:
        _fail(_as_config_error(error), debug)
    except Stopped as stopped:
        print("eri: stopped", file=sys.stderr)
        sys.exit(stopped.exit_code)
    except EriError as error:
        _fail(error, debug)
    except Exception:  # a bug; only now, as Typer sets a hook of its own when an error passes it
        sys.excepthook = lambda kind, error, trace: _print_trace(error)
        raise


def _require_written(output: Outlet, arguments: Sequence[str]) -> None:
    """Refuse to end well if what a command is there to print was lost; a reader may leave."""
    if output.lost is None or isinstance(output.lost, BrokenPipeError):
        return
    if arguments[0] not in WRITES_FILES or "--help" in arguments:
        with disk_errors("standard output"):
            raise output.lost


def _settings(
    config: Path | None,
    model: str | None,
    data: Sequence[str],
    *,
    output: str | None,
    overrides: Sequence[str],
) -> Config:
    """The settings of a run, from a file or from the command line alone."""
    if config is None and model is not None and data:
        return make_config(model=model, data=data, output=output, overrides=overrides)
    if config is None:
        lacks = "--data is missing" if model else "--model is missing"
        raise ConfigError(
            lacks if model or data else "Missing a config, or --model and --data",
            hint="eri train CONFIG, or eri train --model MODEL --data FOLDER",
        )
    if model is not None or data or output is not None:
        raise ConfigError(
            "a config and --model, --data or --output are two ways to say the same",
            where=printable(config),
            hint="leave the config out, or change its settings with --set, as --set output=FOLDER",
        )
    return load_config(config, overrides)


def _base_model(**fields: object) -> ModelSource:
    try:
        return ModelSource.model_validate(fields)
    except ValueError as error:  # only a path can be wrong, such as an empty one
        raise ConfigError(
            f"{fields['path']!r} is no path of a model", hint="demo, a file, a folder or a hub id"
        ) from error


def _as_config_error(error: Exception) -> ConfigError:
    context = getattr(error, "ctx", None)
    command = "eri" if context is None else context.command_path
    what = getattr(error, "format_message", error.__str__)()
    return ConfigError(what.rstrip("."), hint=f"{command} --help")


def _fail(error: EriError, debug: bool) -> NoReturn:
    """Print what is wrong and what to do, on stderr, and leave."""
    if debug:
        _print_trace(error)
    lines = [f"eri: error: {printable(str(error), limit=500)}"]
    lines += [f"  {printable(problem, limit=500)}" for problem in error.problems]
    if error.hint is not None:
        lines.append(f"hint: {printable(error.hint, limit=500)}")
    print("\n".join(lines), file=sys.stderr)
    sys.exit(error.exit_code)


def _print_trace(error: BaseException) -> None:
    """Print a traceback, whose messages and file names may hold anything."""
    for line in "".join(traceback.format_exception(error)).splitlines():
        print(printable(line, limit=1000), file=sys.stderr)


def _say(text: str) -> None:
    for line in text.splitlines():
        out.print(Text(printable(line, limit=1000)), soft_wrap=True)

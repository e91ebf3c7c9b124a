"""`eri init`: a short config to begin with, which says what its settings mean."""

import os
import shlex
from pathlib import Path

from eri.config import dump_config, make_config
from eri.errors import DataError
from eri.files import atomic_write, run_name
from eri.printable import printable
from eri.run.folder import refuse_existing

__all__ = ["SHORT", "init"]

SHORT = (
    "model.path",
    "data.path",
    "data.repeats",
    "data.resolution",
    "data.missing_caption",
    "data.validation",
    "data.flip",
    "data.caption.trigger",
    "output",
    "adapter.rank",
    "train.steps",
    "train.batch_size",
    "train.accumulate",
    "train.lr",
    "save.every",
    "sample.every",
    "sample.prompts",
)
"""The settings that people change most."""

OPENING = """\
# A LoRA from your own pictures; each setting stands below what it means.
#
#   {check}
#   {train}
#
# The first command checks everything and prints the plan, the second one trains; given again, it
# goes on with an unfinished run. These are the settings that are changed most, and a line that is
# removed stands for its default. All settings, and what each one allows: docs/configuration.md.

"""


def init(data: str, *, model: str, output: Path | None, overwrite: bool) -> str:
    """Write a commented config for a folder of images.

    Args:
        data: the folder.
        model: the base model; whether there is one of that name is for `eri train` to find out.
        output: the file to write; <name of the folder>.yaml in the current folder unless said.
        overwrite: whether an existing file is replaced.

    Returns:
        Lines that say what was written and what to do next.

    Raises:
        ConfigError: a path that no setting can be.
        DataError: there is no such folder.
        OccupiedError: the output exists.
        DiskError: it cannot be written.
    """
    config = make_config(model=model, data=[data])
    folder = config.data[0].path
    if not folder.is_dir():
        raise DataError(
            "this is a file" if folder.is_file() else "no such folder",
            where=printable(folder),
            hint="name the folder with your images",
        )
    path = output or Path(f"{run_name(os.path.basename(folder.absolute()))}.yaml")
    refuse_existing(path, overwrite)
    train = f"eri train {shlex.quote(str(path))}"
    commands = {"train": printable(train), "check": printable(f"{train} --dry-run")}
    with atomic_write(path) as file:
        file.write((OPENING.format(**commands) + dump_config(config, only=SHORT)).encode())
    return (
        f"{printable(path)}: base model {printable(model)}, images in {printable(folder)}\n"
        f"next: look through it, then {commands['check']}"
    )

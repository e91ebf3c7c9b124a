"""Adapter files of runs, checkpoints and other programs: found, and written for sure."""

import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import torch

from eri.adapters import layer_shapes
from eri.errors import EriError, ModelError
from eri.files import disk_errors, remove_folder
from eri.formats.adapter_file import (
    PEFT_FILES,
    Dialect,
    LoRAPair,
    Shapes,
    implied_shapes,
    read_adapter,
    underflow,
    write_adapter,
)
from eri.formats.parts import Family
from eri.models.spec import SD15, SD21, SDXL
from eri.models.unet import UNet, UNetSpec
from eri.printable import printable
from eri.run import checkpoints

__all__ = [
    "CONFIG",
    "family_of",
    "find_adapter",
    "finished_adapter",
    "holds",
    "is_finished",
    "layers_in",
    "lost_line",
    "shapes_of",
    "write_verified",
]

CONFIG = "config.yaml"  # of a run, and what makes a folder one
LOST_SHARE_TOLD = 0.01  # of an adapter's numbers becoming zero in the smaller type
SECOND_LAYER = re.compile(r"down\.\d\.layers\.1\..+|up\.\d\.layers\.2\..+")


def shapes_of(spec: UNetSpec) -> dict[str, tuple[int, ...]]:
    """The layers of a U-Net, without building its weights."""
    with torch.device("meta"):
        return layer_shapes(UNet(spec))


def layers_in(adapter: Path) -> dict[str, tuple[int, ...]]:
    """The layers of the net that an adapter was made for, without its base model.

    Raises:
        ModelError: the file is missing, damaged or no adapter, or of no net that eri knows.
        DiskError: it may not be read.
    """
    return implied_shapes(adapter, _known_nets())


def _known_nets() -> Iterator[Shapes]:
    """The nets that adapters are made for; the layers of smaller models are some of theirs."""
    yield _layers_of(SD15)
    yield _layers_of(SD21)
    # An adapter that has nothing in any second layer of a level may be of a net without them, such
    # as KOALA, and must not be given names in which the blocks are counted.
    sdxl = _layers_of(SDXL)
    yield {name: shape for name, shape in sdxl.items() if not SECOND_LAYER.fullmatch(name)}
    yield sdxl


def family_of(adapted: Shapes) -> Family | None:
    """The family of the nets that have these layers; None where those of several or none do.

    Args:
        adapted: the layers that an adapter changes, out of `layers_in`.
    """
    specs = (SD15, SD21, SDXL)
    found: list[Family] = [s.family for s in specs if adapted.items() <= _layers_of(s).items()]
    return found[0] if len(found) == 1 else None


@cache
def _layers_of(spec: UNetSpec) -> Shapes:
    return shapes_of(spec)


def finished_adapter(run: Path) -> Path:
    """Where a run's finished adapter is, or will be."""
    return run / f"{run.absolute().name}.safetensors"


def is_finished(run: Path, checkpoint: checkpoints.Checkpoint | None, steps: int) -> bool:
    """Whether a run has taken all of its steps and its finished adapter is sound and of the last.

    The adapter is the last file that a run writes.
    """
    if checkpoint is None or checkpoint.step < steps:
        return False
    layers = layers_in(checkpoint.adapter)
    pairs = read_adapter(checkpoint.adapter, layers).pairs
    metadata = {"ss_steps": str(checkpoint.step)}
    return holds(finished_adapter(run), pairs, metadata, dtype=torch.float16, layers=layers)


def holds(
    path: Path,
    pairs: Mapping[str, LoRAPair],
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype,
    layers: Shapes,
) -> bool:
    """Whether a sound adapter file of these very numbers, and with this text, is there.

    Args:
        path: of the file.
        pairs: by our module names.
        metadata: which its header has, among other text.
        dtype: in which the numbers are compared.
        layers: all of the net's.
    """
    try:
        found = read_adapter(path, layers)
    except EriError:
        return False
    return (
        found.metadata.items() >= metadata.items()
        and found.pairs.keys() == pairs.keys()
        and all(_same(pair, found.pairs[name], dtype) for name, pair in pairs.items())
    )


def find_adapter(source: Path) -> Path:
    """The adapter file of a run, a checkpoint, or a path that is one.

    Raises:
        ModelError: there is none.
    """
    if (source / CONFIG).is_file():
        finished = finished_adapter(source)
        if finished.is_file():
            return finished
        checkpoint = checkpoints.newest(source)
        if checkpoint is not None:
            return checkpoint.adapter
        raise ModelError(
            "this run has saved no adapter yet",
            where=printable(source),
            hint=f"eri train {source / CONFIG}",
        )
    if (source / checkpoints.STATE).is_file():
        return checkpoints.read(source).adapter
    if not source.exists():
        raise ModelError(
            "no such file or folder", where=printable(source), hint="name a run or an adapter file"
        )
    if source.is_dir() and not any((source / name).exists() for name in PEFT_FILES):
        raise ModelError(
            "no adapter in this folder",
            where=printable(source),
            hint="name an adapter file, a run, a checkpoint or a folder of PEFT",
        )
    return source


def lost_line(pairs: Mapping[str, LoRAPair], dtype: torch.dtype, *, kept_by: str) -> str | None:
    """A warning where more than a few numbers are too small for a type; None where not.

    Args:
        pairs: what is written.
        dtype: in which.
        kept_by: what writes them all.
    """
    lost = underflow(pairs, dtype)
    if lost <= LOST_SHARE_TOLD:
        return None
    return f"warning: {100 * lost:.1f} % of its numbers became 0; {kept_by} keeps them"


def write_verified(
    pairs: Mapping[str, LoRAPair],
    path: Path,
    *,
    dialect: Dialect,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    layers: Shapes,
) -> None:
    """Write an adapter, read it back and compare every number.

    Args:
        pairs: by our module names.
        path: see `write_adapter`.
        dialect: whose names are written.
        dtype: of the matrices.
        metadata: text for the header.
        layers: all of the net's.

    Raises:
        ModelError: what is on the disk is not what was written; it is deleted.
    """
    write_adapter(pairs, path, dialect=dialect, dtype=dtype, metadata=metadata, modules=layers)
    try:
        _require_same(pairs, path, dtype, layers)
    except EriError:
        _delete(path)
        raise


def _require_same(
    pairs: Mapping[str, LoRAPair], path: Path, dtype: torch.dtype, layers: Shapes
) -> None:
    back = read_adapter(path, layers).pairs
    for name, pair in pairs.items():
        again = back.get(name)
        if again is None or not _same_update(pair, again, dtype):
            raise ModelError(f"{name} does not read back as it was written", where=printable(path))


def _delete(path: Path) -> None:
    with disk_errors(path):
        if path.is_dir():
            remove_folder(path)
        else:
            path.unlink(missing_ok=True)


def _same(written: LoRAPair, read: LoRAPair, dtype: torch.dtype) -> bool:
    return (
        _equal(written.down, read.down, dtype)
        and _equal(written.up, read.up, dtype)
        and _same_alpha(written, read)
    )


def _same_update(written: LoRAPair, read: LoRAPair, dtype: torch.dtype) -> bool:
    """Whether the pairs are the same, or `up` holds the scale that the other has beside it.

    A dialect may fold alpha / r into `up`, which rounds each number anew.
    """
    if _same_alpha(written, read):
        return _same(written, read, dtype)
    ours, theirs = (pair.up.cpu().double() * (pair.alpha / pair.rank) for pair in (written, read))
    limits = torch.finfo(dtype)
    least = limits.tiny * limits.eps  # a number below `tiny` is rounded to a multiple of it
    return (
        _equal(written.down, read.down, dtype)
        and ours.shape == theirs.shape
        and torch.allclose(theirs, ours, rtol=limits.eps, atol=least)
    )


def _same_alpha(written: LoRAPair, read: LoRAPair) -> bool:
    """Files hold it in float32."""
    return math.isclose(written.alpha, read.alpha, rel_tol=1e-7)


def _equal(written: torch.Tensor, read: torch.Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(written.cpu().to(dtype), read.to(dtype))

"""Adapter files of runs, checkpoints and other programs: found, and written for sure."""

from collections.abc import Mapping
from pathlib import Path

import torch

from eri.adapters import layer_shapes
from eri.errors import EriError, ModelError
from eri.formats.adapter_file import Dialect, LoRAPair, implied_shapes, read_adapter, write_adapter
from eri.models.spec import SD15
from eri.models.unet import UNet, UNetSpec
from eri.printable import printable
from eri.run import checkpoints

__all__ = [
    "CONFIG",
    "Layers",
    "find_adapter",
    "finished_adapter",
    "is_finished",
    "layers_in",
    "shapes_of",
    "write_verified",
]

Layers = Mapping[str, tuple[int, ...]]
"""Name and weight shape of every layer that an adapter may speak of."""

CONFIG = "config.yaml"  # of a run, and what makes a folder one


def shapes_of(spec: UNetSpec) -> dict[str, tuple[int, ...]]:
    """The layers of a U-Net, without building its weights."""
    with torch.device("meta"):
        return layer_shapes(UNet(spec))


def layers_in(adapter: Path) -> dict[str, tuple[int, ...]]:
    """The layers that an adapter file speaks of, without its base model: shapes as it has them."""
    return implied_shapes(adapter, shapes_of(SD15))


def finished_adapter(run: Path) -> Path:
    """Where a run's finished adapter is, or will be."""
    return run / f"{run.absolute().name}.safetensors"


def is_finished(run: Path, checkpoint: checkpoints.Checkpoint | None, steps: int) -> bool:
    """Whether a run has taken all of its steps and its finished adapter is sound and of the last.

    The adapter is the last file that a run writes.
    """
    if checkpoint is None or checkpoint.step < steps:
        return False
    try:
        path = finished_adapter(run)
        metadata = read_adapter(path, layers_in(path)).metadata
    except EriError:
        return False
    return metadata.get("ss_steps") == str(checkpoint.step)


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
    return source


def write_verified(
    pairs: Mapping[str, LoRAPair],
    path: Path,
    *,
    dialect: Dialect,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    layers: Layers,
) -> None:
    """Write an adapter, read it back and compare every number.

    Raises:
        ModelError: what is on the disk is not what was written.
    """
    write_adapter(pairs, path, dialect=dialect, dtype=dtype, metadata=metadata)
    back = read_adapter(path, layers).pairs
    for name, pair in pairs.items():
        again = back.get(name)
        if again is None or not _same(pair, again, dtype):
            raise ModelError(f"{name} does not read back as it was written", where=printable(path))


def _same(written: LoRAPair, read: LoRAPair, dtype: torch.dtype) -> bool:
    return (
        torch.equal(written.down.cpu().to(dtype), read.down.to(dtype))
        and torch.equal(written.up.cpu().to(dtype), read.up.to(dtype))
        and abs(written.alpha - read.alpha) <= 1e-3 * abs(written.alpha)
    )

"""`eri export-lora`: an adapter rewritten for another program, and read back to be sure."""

from pathlib import Path

import torch

from eri.files import require_space
from eri.formats.adapter_file import AdapterFile, Dialect, Shapes, read_adapter
from eri.formats.metadata import family_metadata, without_data
from eri.printable import printable
from eri.run.adapter_files import (
    family_of,
    find_adapter,
    layers_in,
    lost_line,
    write_verified,
)
from eri.run.folder import refuse_existing

__all__ = ["export"]

BYTES_OF_A_NAME = 1000  # in a header, for both matrices and the alpha of a module
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def export(source: Path, output: Path, *, dialect: Dialect, precision: str, overwrite: bool) -> str:
    """Write the adapter of a run, a checkpoint or a file in another dialect.

    What its header tells of the training data is left out; the family of its base model, by which
    UIs sort adapters, is added where its layers tell it and its header does not.

    Args:
        source: a run, a checkpoint, an adapter file or a PEFT folder.
        output: the file to write; a folder for `peft`.
        dialect: `kohya`, `diffusers` or `peft`.
        precision: `fp16`, `bf16` or `fp32`.
        overwrite: whether an existing file is replaced; a folder never is.

    Returns:
        Lines that say what was written.

    Raises:
        OccupiedError: the output exists.
        DiskError: the disk has no room for it, or may not be written.
        ModelError: the source is not an adapter.
        NonFiniteError: a number is too large for the precision.
    """
    file = find_adapter(source)
    layers = layers_in(file)
    adapter = read_adapter(file, layers)
    refuse_existing(output, overwrite)
    numbers = sum(pair.down.numel() + pair.up.numel() for pair in adapter.pairs.values())
    beside = len(adapter.pairs) * BYTES_OF_A_NAME + sum(map(len, adapter.metadata.values()))
    require_space(output.parent, numbers * DTYPES[precision].itemsize + beside)
    write_verified(
        adapter.pairs,
        output,
        dialect=dialect,
        dtype=DTYPES[precision],
        metadata=_metadata(adapter, layers),
        layers=layers,
    )
    said = f"{printable(output)}: {len(adapter.pairs)} modules, {dialect} names, {precision}"
    lost = lost_line(adapter.pairs, DTYPES[precision], kept_by="--dtype fp32")
    return said if lost is None else f"{said}\n{lost}"


def _metadata(adapter: AdapterFile, layers: Shapes) -> dict[str, str]:
    """What its header tells of the adapter, and of the family where nothing does but its layers."""
    told = without_data(adapter.metadata)
    family = family_of({name: layers[name] for name in adapter.pairs})
    if family is None or told.keys() & family_metadata(family).keys():
        return told
    return told | family_metadata(family)

"""A download that was cut short can have its whole length: the rest of the file is zeros."""

import os
from pathlib import Path

from eri.errors import ModelError
from eri.files import disk_errors
from eri.formats.header import Header
from eri.printable import printable

__all__ = ["require_written"]

LAST = 4  # weight matrices at a file's end that are never all zero in a model
ENOUGH = 2**20  # bytes of zeros that no model ends in, however large its matrices are


def require_written(path: Path, header: Header) -> None:
    """Refuse a file that ends in zeros: its last mebibyte, or less where four matrices are less.

    A bias or a norm may well be zero, and so may a layer that training has not changed, but not
    everything from the fourth-last weight matrix on.

    Raises:
        ModelError: it does.
        DiskError: the file may not be read.
    """
    begins = sorted(
        tensor.begin
        for tensor in header.tensors.values()
        if len(tensor.shape) >= 2 and tensor.end > tensor.begin
    )
    if len(begins) < LAST:
        return
    with disk_errors(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = min(size - header.data_start - begins[-LAST], ENOUGH)
        file.seek(size - length)
        end = file.read(length)
    if end.count(0) == len(end):
        raise ModelError(
            f"the last {length:,} bytes of this file are all zero, as after a download that was "
            "cut short",
            where=printable(path),
            hint="download it again",
        )

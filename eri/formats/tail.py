"""A download that was cut short can have its whole length: the rest of the file is zeros."""

from pathlib import Path

from eri.errors import ModelError
from eri.files import disk_errors
from eri.formats.header import Header, TensorInfo
from eri.printable import printable

__all__ = ["require_written"]

LAST = 4  # weight matrices at a file's end that are never all zero in a model
CHUNK = 2**20


def require_written(path: Path, header: Header) -> None:
    """Refuse a file whose last four weight matrices hold nothing but zeros.

    Raises:
        ModelError: they do.
        DiskError: the file may not be read.
    """
    matrices = [t for t in header.tensors.values() if len(t.shape) >= 2 and t.end > t.begin]
    last = sorted(matrices, key=lambda tensor: tensor.begin)[-LAST:]
    if len(last) < LAST:
        return
    if all(_is_zero(path, header.data_start, tensor) for tensor in reversed(last)):
        raise ModelError(
            f"the last {LAST} weight matrices of this file are all zero, as after a download that "
            "was cut short",
            where=printable(path),
            hint="download it again",
        )


def _is_zero(path: Path, start: int, tensor: TensorInfo) -> bool:
    with disk_errors(path), path.open("rb") as file:
        file.seek(start + tensor.begin)
        left = tensor.end - tensor.begin
        while left:
            chunk = file.read(min(CHUNK, left))
            if chunk.count(0) < len(chunk):
                return False
            left -= len(chunk) or left
    return True

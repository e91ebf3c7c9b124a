"""Tensors in and out of safetensors files; what is written is the same bytes every time.

The reference library keeps metadata in a hash map, so that two of its files differ; here the
metadata is sorted, and tensors stand as that library orders them: by dtype, widest first, then by
name.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eri.errors import ModelError, NonFiniteError
from eri.files import atomic_write, disk_errors
from eri.formats.header import DTYPE_BITS, read_header
from eri.formats.parts import Piece, Pieces
from eri.printable import first_few, printable

__all__ = ["cast", "data_sha256", "load_tensors", "save_tensors", "stream"]

DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
}
READABLE = set(DTYPE_NAMES.values())
FLOATS = {"F8_E5M2", "F8_E4M3", "F16", "BF16", "F32", "F64"}
DTYPE_ORDER = list(DTYPE_BITS)


def load_tensors(
    path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Every tensor of a safetensors file whose header has passed our own checks.

    Args:
        path: the file; it must not be changed while its tensors are in use.
        device: where to.
        dtype: of floating-point tensors; None keeps theirs. Others keep their own.

    Raises:
        ModelError: the file is missing, damaged or something else.
        DiskError: it may not be read.
    """
    unknown = sorted({info.dtype for info in read_header(path).tensors.values()} - READABLE)
    if unknown:
        raise ModelError(
            f"tensors of dtype {', '.join(unknown)} cannot be used", where=printable(path)
        )
    with _opened(path) as file:
        loaded = ((name, file.get_tensor(name)) for name in file.keys())
        return {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None)
            for name, tensor in loaded
        }


def stream(
    pieces: Pieces, *, device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a part, one after the other, from the mapped file to where they are wanted.

    No more than one tensor is held besides those that the caller keeps, and what is given away is
    no longer tied to the file.

    Args:
        pieces: where each tensor lies.
        device: where to.
        dtype: to which all are cast.

    Raises:
        ModelError: a file is damaged, or a weight is no floating-point number, or not finite.
        DiskError: a file may not be read.
    """
    by_file: dict[Path, list[str]] = {}
    for name, piece in pieces.items():
        by_file.setdefault(piece.file, []).append(name)
    extremes: dict[str, Tensor] = {}  # looked at once, at the end: a GPU need not wait before
    for path, names in by_file.items():
        _require_floats(path, [pieces[name] for name in names])
        with _opened(path) as file:
            for name in names:
                tensor = _read(file, pieces[name]).to(device, dtype, copy=True)
                extremes[name] = _extremes(tensor)
                yield name, tensor
    _require_finite(pieces, extremes)


def _require_floats(path: Path, pieces: Sequence[Piece]) -> None:
    bad = [f"{printable(p.key)}: {p.dtype}" for p in pieces if p.dtype not in FLOATS]
    if bad:
        raise ModelError(
            f"{len(bad)} weights are not plain floating-point numbers",
            where=printable(path),
            hint="use the version in fp16, bf16, fp32 or plain fp8",
            problems=first_few(bad, str),
        )


def _extremes(tensor: Tensor) -> Tensor:
    """The least and the greatest number, float32 `[2]`; NaN where there is one among them."""
    if not tensor.numel():
        return torch.zeros(2, device=tensor.device)
    return torch.stack(torch.aminmax(tensor)).float()


def _read(file: Any, piece: Piece) -> Tensor:
    if piece.rows is None:
        tensor = file.get_tensor(piece.key)
    else:
        tensor = file.get_slice(piece.key)[slice(*piece.rows)]
    return tensor.T.contiguous() if piece.transposed else tensor


def _require_finite(pieces: Pieces, extremes: dict[str, Tensor]) -> None:
    """Raises ModelError for weights that hold a NaN, an infinity, or more than the dtype holds."""
    if not extremes:
        return
    finite = torch.stack(list(extremes.values())).isfinite().all(dim=1).tolist()
    bad = [pieces[name] for name, fine in zip(extremes, finite, strict=True) if not fine]
    if bad:
        raise ModelError(
            f"{len(bad)} weights hold a NaN or an infinity",
            where=printable(bad[0].file),
            hint="the model is damaged, or was saved in a type too small for it: use another "
            "version",
            problems=first_few(bad, lambda piece: printable(piece.key)),
        )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file for reading on the CPU; the library's own errors become ours."""
    try:
        with disk_errors(path), safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise ModelError(
            f"the tensors cannot be read: {printable(str(error))}",
            where=printable(path),
            hint="download it again",
        ) from error


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file: whole or not at all, and the same bytes for the same content.

    Args:
        tensors: of any device and layout.
        path: replaced when it exists.
        metadata: text by name.

    Raises:
        DiskError: the disk is full, or the path may not be written.
        ValueError: a dtype that the format does not have, or a tensor named `__metadata__`.
    """
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    end = 0
    for name, tensor in _ordered(tensors):
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in _ordered(tensors):
            file.write(_bytes(tensor))


def data_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 in hex of the bytes that `save_tensors` writes behind the header."""
    digest = hashlib.sha256()
    for _, tensor in _ordered(tensors):
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors in another floating-point type, every number of them still finite.

    Raises:
        NonFiniteError: a tensor holds NaN or infinity, or a number too large for `dtype`.
    """
    found = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    bad = [name for name, tensor in found.items() if not tensor.isfinite().all()]
    if bad:
        name = str(dtype).removeprefix("torch.")
        raise NonFiniteError(
            f"{len(bad)} of {len(found)} tensors cannot be written as {name}",
            hint="use an earlier checkpoint, or write fp32",
            problems=first_few(bad, lambda key: _why(key, tensors[key], name)),
        )
    return found


def _why(name: str, tensor: Tensor, dtype: str) -> str:
    bad = int((~tensor.isfinite()).sum())
    if bad:
        return f"{printable(name)}: {bad} of {tensor.numel()} numbers are NaN or infinite"
    return f"{printable(name)}: {tensor.abs().max():.4g} is too large for {dtype}"


def _ordered(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES or name == "__metadata__":
            raise ValueError(f"{name!r}: a {tensor.dtype} cannot be written under this name")
    yield from sorted(
        tensors.items(),
        key=lambda item: (-DTYPE_ORDER.index(DTYPE_NAMES[item[1].dtype]), item[0]),
    )


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data

"""The header of a safetensors file, checked before anything is allocated; free of torch.

Layout: N as 8 bytes, little-endian; N bytes of JSON, name → dtype, shape and data_offsets; the
data. The rules are those of the reference library and stricter where it lets something pass that no
writer writes: a first byte other than `{`, names given twice, a header of more than 16 MB.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from eri.errors import ModelError
from eri.files import disk_errors
from eri.formats.strict_json import parse_object
from eri.printable import printable

__all__ = ["DTYPE_BITS", "Header", "TensorInfo", "read_header"]

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 50_000  # the largest models have some thousand
MAX_STRINGS = 8 * MAX_TENSORS  # each tensor has five; the rest is for metadata
MAX_MARKS = {b"{": 2 * MAX_TENSORS, b"[": 3 * MAX_TENSORS, b",": 10 * MAX_TENSORS}
"""Of the JSON, outside of its strings: a tensor has one, two, and some three to ten."""
MAX_DIMENSIONS = 8
MAX_NAME_BYTES = 512
MAX_NUMBER = 2**63 - 1

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of one element, in the order in which the reference library sorts tensors."""

AGAIN = "download it again"
NO_PICKLE = "files of torch.save (.ckpt, .pt, .bin) can run code: use the .safetensors version"
NO_PROGRAM = "it is a program, which can run code: use the weights, a .safetensors file"
FOREIGN = (  # first bytes, what such a file is, one thing to do
    (b"version https://git-lfs", "a git-lfs pointer", "fetch the file itself: `git lfs pull`"),
    (b"<", "a web page", "the server answered with a page, perhaps to log in: download it again"),
    (b"{", "a JSON text", "the server may have answered with an error: download it again"),
    (b"\x80", "a pickle", NO_PICKLE),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"\xfd7zXZ", "an xz archive", "unpack it"),
    (b"BZh", "a bzip2 archive", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it"),
    (b"Rar!", "a RAR archive", "unpack it"),
    (b"GGUF", "a GGUF file", "use the .safetensors version"),
    (b"\x89HDF", "an HDF5 file", "use the .safetensors version"),
    (b"\x93NUMPY", "an array of numpy", "use the .safetensors version"),
    (b"\x89PNG", "an image", "name the model's file"),
    (b"\xff\xd8\xff", "an image", "name the model's file"),
)
ZIP = b"PK\x03\x04"
IN_ZIP = (  # part of a name in a zip archive, what the archive is then, one thing to do
    (b"/constants.pkl", "a program of TorchScript", NO_PROGRAM),
    (b"/archive_format", "a program of torch.export (.pt2)", NO_PROGRAM),
    (b"serialized_exported_program", "a program of torch.export (.pt2)", NO_PROGRAM),
    (b"data.pkl", "a zip archive of torch.save", NO_PICKLE),
    (b"", "a zip archive", "unpack it"),
)
NAMES_OF_ZIP = 2**20  # bytes of a file's end; they name the members of most archives
TAR_AT, TAR = 257, b"ustar"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: its dtype as the file spells it, its shape, and its bytes in the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file holds.

    `data_start` is the offset in the file that `begin` and `end` of the tensors count from.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """Read and check a header; no tensor is read.

    Raises:
        ModelError: the file is missing, something else, damaged, or beyond the limits above.
        DiskError: it may not be read.
    """
    if not path.is_file():
        what = "this is not a regular file" if path.exists() else "no such file"
        raise ModelError(what, where=printable(path))
    with disk_errors(path), path.open("rb") as file:
        return _read(file, os.fstat(file.fileno()).st_size, path)


def _read(file: BinaryIO, size: int, path: Path) -> Header:
    start = file.read(512)
    length = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{" or length >= 2**48:  # no text reads as a smaller number
        file.seek(max(0, size - NAMES_OF_ZIP))
        raise _foreign(path, start, file.read(min(size, NAMES_OF_ZIP)))
    file.seek(8)
    text = file.read(min(length, size, MAX_HEADER_BYTES))  # a read makes room before it reads
    try:
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {length:,} bytes, allowed are {MAX_HEADER_BYTES:,}")
        if len(text) < length:
            raise ValueError(f"it ends after {size:,} of {8 + length:,} bytes of header")
        return _parse(text, data_bytes=size - 8 - length)
    except ValueError as error:
        raise ModelError(
            f"this safetensors file is damaged: {printable(str(error))}",
            where=printable(path),
            hint=AGAIN,
        ) from error


def _foreign(path: Path, start: bytes, end: bytes) -> ModelError:
    """What a file is that does not begin like a safetensors file; nothing of it is unpacked."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    known = [(found, hint) for magic, found, hint in FOREIGN if text.startswith(magic)]
    if start.startswith(ZIP):
        known = [(found, hint) for name, found, hint in IN_ZIP if name in start or name in end]
    elif start.startswith(TAR, TAR_AT):
        known = [("a tar archive, perhaps of an old torch.save", NO_PICKLE)]
    if known:
        what = f"this is {known[0][0]}, not a safetensors file"
        return ModelError(what, where=printable(path), hint=known[0][1])
    what = "this is not a safetensors file" if start else "the file is empty"
    return ModelError(what, where=printable(path), hint=AGAIN)


def _parse(text: bytes, *, data_bytes: int) -> Header:
    """Raises ValueError with what is wrong; names in it are not yet printable."""
    _require_few_parts(text)
    entries = parse_object(text)
    metadata = _metadata(entries.pop("__metadata__", None))
    if len(entries) > MAX_TENSORS:
        raise ValueError(f"it names {len(entries):,} tensors, allowed are {MAX_TENSORS:,}")
    tensors = {name: _tensor(name, entry) for name, entry in entries.items()}
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != end:
            raise ValueError(f"the bytes of {name} begin at {info.begin:,}, expected {end:,}")
        end = info.end
    if end != data_bytes:
        raise ValueError(f"its tensors take {end:,} bytes, the file holds {data_bytes:,}")
    return Header(tensors=tensors, metadata=metadata, data_start=8 + len(text))


def _require_few_parts(text: bytes) -> None:
    """Refuse JSON of which the parser would make very many objects: a byte may cost it dozens.

    Raises:
        ValueError: it has more strings, brackets or commas than a header with `MAX_TENSORS`.
    """
    plain = text.replace(rb"\\", b"").replace(rb"\"", b"")
    strings = plain.count(b'"') // 2
    if strings > MAX_STRINGS:
        raise ValueError(f"it has {strings:,} strings, allowed are {MAX_STRINGS:,}")
    outside = b"".join(plain.split(b'"')[::2])
    for mark, most in MAX_MARKS.items():
        if (count := outside.count(mark)) > most:
            raise ValueError(f"it has {count:,} of '{mark.decode()}', allowed are {most:,}")


def _metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("its __metadata__ is not a map from text to text")
    return value


def _tensor(name: str, entry: Any) -> TensorInfo:
    if len(name.encode(errors="surrogatepass")) > MAX_NAME_BYTES:
        raise ValueError(f"a name has more than {MAX_NAME_BYTES} bytes: {name[:50]}")
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]}:
            pass
        case _:
            raise ValueError(f"{name} has no dtype, shape and two data_offsets")
    if dtype not in DTYPE_BITS:
        raise ValueError(f"{name} has the unknown dtype {dtype}")
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name} has {len(shape)} dimensions, allowed are {MAX_DIMENSIONS}")
    for number in (*shape, begin, end):
        if type(number) is not int or not 0 <= number <= MAX_NUMBER:
            raise ValueError(f"{name} has a size or offset that is no whole number of 63 bits")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (end - begin):
        raise ValueError(f"{name} {shape} takes {bits // 8:,} bytes, not {end - begin:,}")
    if math.prod(side or 1 for side in shape) * DTYPE_BITS[dtype] > MAX_NUMBER:
        raise ValueError(f"{name} {shape} is empty, and yet its other sides are too large")
    return TensorInfo(dtype=dtype, shape=tuple(shape), begin=begin, end=end)

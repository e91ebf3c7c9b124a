"""JSON that comes from elsewhere: no duplicate keys, no NaN, no surprise in size or depth.

Where Python's parser lets something pass that the library of safetensors refuses, the library is
followed: half of a surrogate pair is no text, and -0 is no whole number.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eri.errors import ModelError
from eri.files import disk_errors
from eri.printable import printable

__all__ = ["parse_object", "read_object"]

MAX_BYTES = 16 * 2**20


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The JSON object that `text` holds.

    Raises:
        ValueError: it is not JSON or no object, has a key twice, a NaN, half of a surrogate pair,
            or nests too deep.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constants,
            parse_int=_whole if "-0" in text else None,
        )
        if "\\ud" in text or "\\uD" in text:
            _no_surrogates(value)
    except RecursionError:
        raise ValueError("it nests too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        ModelError: the file is missing, larger than 16 MB, or not one strict JSON object.
        DiskError: it may not be read.
    """
    if not path.is_file():
        raise ModelError(
            f"{printable(path.name)} is missing",
            where=printable(path.parent),
            hint="download the whole folder again",
        )
    with disk_errors(path), path.open("rb") as file:
        text = file.read(MAX_BYTES + 1)
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
        return parse_object(text)
    except ValueError as error:
        raise ModelError(
            f"this is not a JSON file that can be used: {printable(str(error))}",
            where=printable(path),
            hint="download the file again",
        ) from error


def _no_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key '{twice}' stands there twice")
    return values


def _no_constants(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _no_surrogates(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{half} is half of a character") from None


def _whole(digits: str) -> int | float:
    return -0.0 if digits == "-0" else int(digits)

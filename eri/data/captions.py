"""One caption file to its texts, or to one line that says why not."""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eri.data.images import open_regular
from eri.errors import DataError
from eri.printable import printable

__all__ = [
    "CAPTION_SUFFIXES",
    "Written",
    "caption_from_name",
    "decode_text",
    "parse_mapping",
    "read_caption",
    "texts_of",
]

CAPTION_SUFFIXES = frozenset({".txt", ".caption", ".json"})
MAX_BYTES = 65_536  # of a caption
MAX_JSON_BYTES = 1_048_576  # of a file that may hold much else
TEXT_KEYS = ("caption", "captions", "text", "tags")
"""Keys of a JSON file that hold captions; the first one with a text in it is used."""

KEYS_SHOWN = 5


class Written(NamedTuple):
    """What a file says about its image.

    Args:
        texts: as written, without the white space around them; of several, each is a caption.
        silence: where there are none, why.
    """

    texts: tuple[str, ...]
    silence: str = ""


def read_caption(path: Path) -> Written:
    """The texts of a caption file; UTF-8, with or without BOM.

    A `.json` file is a mapping in which one of `TEXT_KEYS` is a text or a list of texts; the texts
    of `tags` make one caption. Every other file is one caption.

    Raises:
        DataError: the file cannot be read, is not UTF-8, is too long, holds control characters, or
            is no JSON; names it.
    """
    is_json = path.suffix.lower() == ".json"
    limit = MAX_JSON_BYTES if is_json else MAX_BYTES
    try:
        with open_regular(path) as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise ValueError(f"a caption of more than {limit} bytes; shorten it")
        text = decode_text(content)
        return _from_json(text) if is_json else _from_text(text)
    except ValueError as error:
        raise DataError(str(error), where=printable(path)) from error
    except OSError as error:
        what = f"cannot be read: {error.strerror}; copy it to another disk"
        raise DataError(what, where=printable(path)) from error


def caption_from_name(path: Path) -> str:
    """The name of an image as its caption: without its ending, underscores as spaces.

    Raises:
        DataError: the name is not text.
    """
    name = path.stem.replace("_", " ").strip()
    if printable(name, limit=len(name)) != name:
        what = "the name is no text that could be a caption; rename it"
        raise DataError(what, where=printable(path))
    return name


def decode_text(content: bytes) -> str:
    """UTF-8, with or without BOM, to text.

    Raises:
        ValueError: it is something else; says at which byte.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"byte {error.start} is not UTF-8 ({_likely_encoding(content)}); save it as UTF-8"
        raise ValueError(what) from error


def parse_mapping(text: str) -> dict[str, Any] | None:
    """The JSON object that a text holds; None for other JSON.

    Raises:
        ValueError: it is no JSON, nests too deep, or has a key twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates)
    except RecursionError:
        raise ValueError("JSON that nests too deep; mend it") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error}); mend it") from error
    return value if isinstance(value, dict) else None


def texts_of(values: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    """The captions under the first of some keys that has any.

    Raises:
        ValueError: a value is neither text nor a list of texts, or a text cannot be a caption.
    """
    for key in keys:
        texts = _texts(key, values.get(key))
        if texts:
            return (", ".join(texts),) if key == "tags" else texts
    return ()


def _from_text(content: str) -> Written:
    text = content.strip()
    _refuse_what_is_no_caption(text)
    return Written((text,)) if text else Written((), "is empty")


def _from_json(content: str) -> Written:
    if not content.strip():
        return Written((), "is empty")
    values = parse_mapping(content)
    if values is None:
        return Written((), "holds no mapping")
    texts = texts_of(values, TEXT_KEYS)
    if texts:
        return Written(texts)
    if any(key in values for key in TEXT_KEYS):
        return Written((), "holds an empty caption")
    shown = [f"'{printable(key, limit=40)}'" for key in list(values)[:KEYS_SHOWN]]
    more = ["…"] if len(values) > KEYS_SHOWN else []
    found = ", ".join([*shown, *more]) or "nothing"
    return Written((), f"holds {found} and none of {', '.join(TEXT_KEYS)}")


def _texts(key: str, value: object) -> tuple[str, ...]:
    """The texts that are not empty."""
    parts = value if isinstance(value, list) else [] if value is None else [value]
    texts: list[str] = []
    for part in parts:
        if not isinstance(part, str):
            kind = type(part).__name__
            raise ValueError(f"'{key}' holds {kind}, not text or a list of texts; mend it")
        text = part.strip()
        _refuse_what_is_no_caption(text)
        texts.append(text)
    return tuple(text for text in texts if text)


def _refuse_what_is_no_caption(text: str) -> None:
    if text.isprintable() and len(text) * 4 <= MAX_BYTES:
        return
    for character in text:
        if unicodedata.category(character) in {"Cc", "Cs"} and character not in "\n\r\t":
            shown = printable(character)
            raise ValueError(f"holds the control character '{shown}'; save it as plain text")
    if len(text.encode()) > MAX_BYTES:
        raise ValueError(f"a caption of more than {MAX_BYTES} bytes; shorten it")


def _no_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in values if keys.count(key) > 1)
        raise ValueError(f"the key '{printable(twice, limit=40)}' stands there twice; remove one")
    return values


def _likely_encoding(content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "it looks like UTF-16"
    return "it may be an encoding of Windows, such as cp1252 or cp932"

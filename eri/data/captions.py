"""One caption file to its text, or to one line that says why not."""

import unicodedata
from pathlib import Path

from eri.data.images import open_regular
from eri.errors import DataError
from eri.printable import printable

__all__ = ["CAPTION_SUFFIXES", "caption_from_name", "read_caption"]

CAPTION_SUFFIXES = frozenset({".txt", ".caption"})
MAX_BYTES = 65_536


def read_caption(path: Path) -> str:
    """The text of a caption file, without the white space around it; UTF-8, with or without BOM.

    Raises:
        DataError: the file cannot be read, is not UTF-8, is too long, or holds control characters.
    """
    with open_regular(path) as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise DataError(f"a caption of more than {MAX_BYTES} bytes", where=printable(path))
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        what = f"byte {error.start} is not UTF-8 ({_likely_encoding(content)}); save it as UTF-8"
        raise DataError(what, where=printable(path)) from error
    for character in text:
        if unicodedata.category(character) == "Cc" and character not in "\n\r\t":
            what = f"holds the control character '{printable(character)}'; save it as plain text"
            raise DataError(what, where=printable(path))
    return text


def caption_from_name(path: Path) -> str:
    """The name of an image as its caption: without its ending, underscores as spaces.

    Raises:
        DataError: the name is not text.
    """
    name = path.stem.replace("_", " ").strip()
    if printable(name, limit=len(name)) != name:
        raise DataError("the name is no text that could be a caption", where=printable(path))
    return name


def _likely_encoding(content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "it looks like UTF-16"
    return "it may be an encoding of Windows, such as cp1252 or cp932"

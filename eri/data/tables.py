"""Tables of captions: `metadata.jsonl` and `metadata.csv` of the Hugging Face `imagefolder` format.

A row names an image by `file_name`, relative to the table's own folder, and has its caption under
`text`, `caption`, `captions` or `prompt`. No file is opened by a name in a row: rows are matched
with images that were found otherwise. Source: Hugging Face Datasets, "Create an image dataset".
"""

import csv
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from eri.data.captions import decode_text, parse_mapping, texts_of
from eri.data.images import open_regular
from eri.data.items import Fault
from eri.errors import DataError
from eri.printable import printable

__all__ = ["TABLE_NAMES", "Row", "read_table"]

TABLE_NAMES = frozenset({"metadata.jsonl", "metadata.csv"})
TEXT_COLUMNS = ("text", "caption", "captions", "prompt")
"""Where the caption of a row is; the first one with a text in it is used."""

NAME_COLUMN = "file_name"
MAX_BYTES = 256 * 2**20  # of a table
MAX_LINE = 2**20


class Row(NamedTuple):
    """A row of a table: which image it is about, by a path that need not be there.

    Args:
        table: path of the table.
        line: of the table, from 1, where the row begins.
        image: path of the image.
        texts: as written, without the white space around them; none where it has no caption.
    """

    table: Path
    line: int
    image: Path
    texts: tuple[str, ...]

    @property
    def place(self) -> str:
        """The row's file and line, fit to print."""
        return f"{printable(self.table)}:{self.line}"


def read_table(path: Path) -> Iterator[Row | Fault]:
    """The rows of a table, and a fault for each row, or for the table, that cannot be used."""
    read = _csv_rows if path.suffix == ".csv" else _json_rows
    try:
        with open_regular(path) as file:
            yield from read(path, file)
    except DataError as error:
        yield Fault(path, error.what, thing="table")
    except OSError as error:
        what = f"cannot be read: {error.strerror}; copy it to another disk"
        yield Fault(path, what, thing="table")


def _json_rows(path: Path, file: BufferedReader) -> Iterator[Row | Fault]:
    for line, content in _lines(file):
        try:
            text = decode_text(content).strip()
            if not text:
                continue
            values = parse_mapping(text)
            if values is None:
                raise ValueError("not a JSON mapping; mend the line")
            yield _row(path, line, values)
        except ValueError as error:
            yield Fault(path, str(error), line, thing="row")


def _csv_rows(path: Path, file: BufferedReader) -> Iterator[Row | Fault]:
    reader = csv.reader((decode_text(content) for _, content in _lines(file)), strict=True)
    header: list[str] = []
    line = 1
    try:
        header = next(reader, [])
        if NAME_COLUMN not in header:
            found = ", ".join(f"'{printable(name, limit=40)}'" for name in header[:5])
            raise ValueError(f"no column '{NAME_COLUMN}' in its first line ({found}); add it")
        if len(set(header)) < len(header):
            raise ValueError("its first line names a column twice; rename one")
        line = reader.line_num + 1
        for values in reader:
            if values:
                yield _csv_row(path, line, header, values)
            line = reader.line_num + 1
    except (ValueError, csv.Error) as error:  # of the text itself: what follows is guesswork
        what = f"{error}; nothing is read from here on" if line > 1 else str(error)
        yield Fault(path, what, line, thing="table")


def _csv_row(path: Path, line: int, header: list[str], values: list[str]) -> Row | Fault:
    if len(values) != len(header):
        what = f"{len(values)} values for {len(header)} columns; put quotes around text with commas"
        return Fault(path, what, line, thing="row")
    try:
        return _row(path, line, dict(zip(header, values, strict=True)))
    except ValueError as error:
        return Fault(path, str(error), line, thing="row")


def _row(path: Path, line: int, values: Mapping[str, Any]) -> Row:
    name = values.get(NAME_COLUMN)
    if not isinstance(name, str) or not name.strip("/. "):
        raise ValueError(f"no image named under '{NAME_COLUMN}'; add it, or remove the row")
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\0" in name:
        shown = printable(name, limit=80)
        raise ValueError(f"'{shown}' leads out of the folder; name files in it, or remove the row")
    return Row(path, line, path.parent / parts, texts_of(values, TEXT_COLUMNS))


def _lines(file: BufferedReader) -> Iterator[tuple[int, bytes]]:
    """Numbered lines with their ends.

    Raises:
        DataError: the table or a line of it is too long.
    """
    number, total = 0, 0
    while content := file.readline(MAX_LINE + 1):
        number += 1
        total += len(content)
        if len(content) > MAX_LINE:
            raise DataError(f"line {number} has more than {MAX_LINE} bytes; shorten it")
        if total > MAX_BYTES:
            raise DataError(f"more than {MAX_BYTES} bytes; split it over several folders")
        yield number, content

import os
from pathlib import Path

import pytest

from eri.data.items import Fault
from eri.data.tables import Row, read_table


def rows(folder: Path, name: str, content: bytes) -> list[tuple[int, str, tuple[str, ...]]]:
    (folder / name).write_bytes(content)
    found = list(read_table(folder / name))
    assert not [row for row in found if isinstance(row, Fault)]
    return [
        (row.line, row.image.relative_to(folder).as_posix(), row.texts)
        for row in found
        if isinstance(row, Row)
    ]


def faults(folder: Path, name: str, content: bytes) -> list[tuple[int, str]]:
    (folder / name).write_bytes(content)
    found = [row for row in read_table(folder / name) if isinstance(row, Fault)]
    assert all(fault.path == folder / name and str(fault).isprintable() for fault in found)
    return [(fault.line, fault.what) for fault in found]


@pytest.mark.parametrize("column", ["text", "caption", "captions", "prompt"])
def test_json_rows(tmp_path: Path, column: str) -> None:
    content = (
        b"\xef\xbb\xbf"
        + f'{{"file_name": "a.png", "{column}": " a fox\\n", "id": 1}}\r\n\n'.encode()
        + f'{{"file_name": "./sub//b.png", "{column}": ["a cat", "\u72d0"]}}\n'.encode()
        + b'{"file_name": "c.png"}'
    )
    assert rows(tmp_path, "metadata.jsonl", content) == [
        (1, "a.png", ("a fox",)),
        (3, "sub/b.png", ("a cat", "\u72d0")),
        (4, "c.png", ()),
    ]


@pytest.mark.parametrize("column", ["text", "caption", "captions", "prompt"])
def test_csv_rows(tmp_path: Path, column: str) -> None:
    content = (
        b"\xef\xbb\xbf"
        + f"id,file_name,{column}\r\n".encode()
        + b'1,a.png,"a fox, ""red""\nin two lines"\r\n\r\n2,sub/b.png,\r\n3,c.png,a cat'
    )
    assert rows(tmp_path, "metadata.csv", content) == [
        (2, "a.png", ('a fox, "red"\nin two lines',)),
        (5, "sub/b.png", ()),
        (6, "c.png", ("a cat",)),
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "not JSON"),
        (b"[]", "not a JSON mapping"),
        (b'{"text": "a fox"}', "no image named under 'file_name'"),
        (b'{"file_name": 7, "text": "a fox"}', "no image named"),
        (b'{"file_name": "", "text": "a fox"}', "no image named"),
        (b'{"file_name": "../a.png", "text": "a"}', "'../a.png' leads out of the folder"),
        (b'{"file_name": "b/../../a.png", "text": "a"}', "leads out"),
        (b'{"file_name": "/etc/a.png", "text": "a"}', "leads out"),
        (b'{"file_name": "a.png", "text": 7}', "'text' holds int"),
        (b'{"file_name": "a.png", "text": "a\\u0000"}', "control character"),
        (b'{"file_name": "a.png", "text": "a", "text": "b"}', "twice"),
        (b'{"file_name": "a.png", "text": "caf\xe9"}', "not UTF-8"),
    ],
)
def test_a_bad_json_row_is_named_by_its_line(tmp_path: Path, line: bytes, words: str) -> None:
    good = b'{"file_name": "b.png", "text": "b"}'
    found = faults(tmp_path, "metadata.jsonl", good + b"\n" + line + b"\n" + good)
    assert [number for number, _ in found] == [2]
    assert words in found[0][1]


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (b"", 1, "no column 'file_name' in its first line ()"),
        (b"file_name;text\na.png;a fox", 1, "('file_name;text')"),
        (b"file_name,text,text\n", 1, "names a column twice"),
        (b"file_name,text\na.png,a fox, red\n", 2, "3 values for 2 columns; put quotes"),
        (b"file_name,text\na.png\n", 2, "1 values for 2 columns"),
        (b"file_name,text\n\n../a.png,a\n", 3, "leads out"),
        (b'file_name,text\na.png,"a fox', 2, "nothing is read from here on"),
        (b'file_name,text\na.png,"a"fox\n', 2, "nothing is read from here on"),
        (b"file_name,text\na.png,caf\xe9\n", 2, "not UTF-8"),
        (b"file_name,text\na.png,a\0b\n", 2, "control character"),
    ],
)
def test_a_bad_csv_row_is_named_by_its_line(
    tmp_path: Path, content: bytes, line: int, words: str
) -> None:
    found = faults(tmp_path, "metadata.csv", content)
    assert [number for number, _ in found] == [line]
    assert words in found[0][1]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_table_that_is_no_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    (fault,) = read_table(tmp_path / name)
    assert isinstance(fault, Fault)
    assert "not a regular file" in fault.what


@pytest.mark.parametrize(
    ("name", "content", "things"),
    [
        ("metadata.jsonl", b"{\n[]\n{}", ["row", "row", "row"]),
        ("metadata.csv", b"name,text\n", ["table"]),
        ("metadata.csv", b'file_name,text\na\n,a\nb.png,"b', ["row", "row", "table"]),
    ],
)
def test_a_fault_is_of_a_row_or_of_all_that_follows(
    tmp_path: Path, name: str, content: bytes, things: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    found = list(read_table(tmp_path / name))
    assert [row.thing for row in found if isinstance(row, Fault)] == things


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_line_without_an_end_is_refused(tmp_path: Path, name: str) -> None:
    ((_, what),) = faults(
        tmp_path, name, b"file_name,text\n" * (name == "metadata.csv") + b"x" * 2**21
    )
    assert "has more than 1048576 bytes" in what


def test_a_table_of_any_length_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eri.data.tables.MAX_BYTES", 100)
    row = b'{"file_name": "b.png", "text": "b"}\n'
    ((_, what),) = faults(tmp_path, "metadata.jsonl", row * 3)
    assert "more than 100 bytes" in what

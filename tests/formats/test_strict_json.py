"""JSON from elsewhere: what is not plain, strict JSON is refused in words."""

import time
from pathlib import Path

import pytest

from eri.errors import ModelError
from eri.formats.strict_json import MAX_BYTES, parse_object, read_object


def test_reads_an_object() -> None:
    assert parse_object(b' {"a": [1, 2.5, null, "\xc3\xa9"]} ') == {"a": [1, 2.5, None, "é"]}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "Expecting value"),
        (b"[1]", "holds a list"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands there twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": ' + b"[" * 200_000, "nests too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b'\xff{"a": 1}', "utf-8"),
        ('{"a": 1}'.encode("utf-16"), "utf-8"),
        (b'{"a": 1} {}', "Extra data"),
    ],
)
def test_refuses(text: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_object(text)


def test_many_keys_take_no_quadratic_time() -> None:
    text = "{" + ",".join(f'"{i}":0' for i in range(100_000)) + ',"99999":0}'
    start = time.perf_counter()
    with pytest.raises(ValueError, match="'99999' stands there twice"):
        parse_object(text)
    assert time.perf_counter() - start < 5


def test_file_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        read_object(tmp_path / "config.json")
    path = tmp_path / "config.json"
    path.write_text('{"a\x1b": 1, "a\x1b": 2}')
    with pytest.raises(ModelError) as refused:
        read_object(path)
    assert str(path) in str(refused.value)
    path.write_text('{"\\u001b[2J": 1, "\\u001b[2J": 2}')
    with pytest.raises(ModelError, match=r"\\x1b\[2J"):
        read_object(path)


def test_file_size_is_limited(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    path.write_bytes(b'{"a": 1}' + b" " * MAX_BYTES)
    with pytest.raises(ModelError, match="more than"):
        read_object(path)

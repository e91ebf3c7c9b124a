import json
import os
from pathlib import Path

import pytest

from eri.data.captions import caption_from_name, read_caption
from eri.errors import DataError


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a red fox", "a red fox"),
        (b"\xef\xbb\xbfa fox\r\n", "a fox"),
        (b"  a fox \n\n", "a fox"),
        ("ein Fuchs, 狐 🦊".encode(), "ein Fuchs, 狐 🦊"),
        (b"two\nlines\tand a tab", "two\nlines\tand a tab"),
        (b"(literal:1.2) [text] # with \\ all", "(literal:1.2) [text] # with \\ all"),
        (b"", ""),
        (b" \n", ""),
        (b"x" * 65_536, "x" * 65_536),
    ],
)
def test_a_caption_is_its_text(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert read_caption(tmp_path / "a.txt").texts == ((text,) if text else ())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"caf\xe9", "byte 3 is not UTF-8 (it may be an encoding of Windows"),
        ("狐".encode("cp932"), "byte 0 is not UTF-8"),
        ("a fox".encode("utf-16"), "byte 0 is not UTF-8 (it looks like UTF-16)"),
        ("a fox".encode("utf-16-le"), "control character '\\x00'"),
        (b"a\x1b[2Jfox", "control character '\\x1b'"),
        (b"x" * 65_537, "more than 65536 bytes"),
    ],
)
def test_what_is_no_caption_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_caption(tmp_path / "a.txt")
    assert words in caught.value.what
    assert caught.value.where == str(tmp_path / "a.txt")


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match="not a regular file"):
        read_caption(tmp_path / "a.txt")


def test_a_name_is_a_caption() -> None:
    assert caption_from_name(Path("x/a_red_fox-2.final.png")) == "a red fox-2.final"


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"a\x1b.png", b"a\xe2\x80\xae.png"])
def test_a_name_that_is_no_text_is_no_caption(name: bytes) -> None:
    with pytest.raises(DataError, match="no text"):
        caption_from_name(Path(os.fsdecode(name)))


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ({"caption": " a fox\n"}, ("a fox",)),
        ({"captions": ["a fox", "a red fox "]}, ("a fox", "a red fox")),
        ({"text": ["a fox"], "id": 7}, ("a fox",)),
        ({"tags": "fox, red"}, ("fox, red",)),
        ({"tags": ["fox", " red", ""]}, ("fox, red",)),
        ({"tags": ["fox"], "caption": "a fox"}, ("a fox",)),
        ({"tags": ["fox"], "caption": "", "text": None}, ("fox",)),
        ({"caption": ["", " "]}, ()),
        ({"id": 7}, ()),
        (["a fox"], ()),
    ],
)
def test_a_json_file_holds_captions(tmp_path: Path, value: object, texts: tuple[str]) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(value).encode())
    written = read_caption(tmp_path / "a.json")
    assert written.texts == texts
    assert bool(written.silence) != bool(texts)


def test_json_without_a_caption_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"id": 1, "e\x7f": 2, "c": 3, "d": 4, "f": 5, "g": 6}')
    told = read_caption(tmp_path / "a.json").silence
    assert (
        told == "holds 'id', 'e\\x7f', 'c', 'd', 'f', … and none of caption, captions, text, tags"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not JSON"),
        (b'{"caption": 7}', "'caption' holds int, not text"),
        (b'{"tags": {"general": ["fox"]}}', "'tags' holds dict, not text"),
        (b'{"caption": "a", "caption": "b"}', "'caption' stands there twice"),
        (b'{"caption": "a\\u0000b"}', "control character '\\x00'"),
        (b'{"caption": "a\\ud800b"}', "control character '\\ud800'"),
        (b"[" * 100_000, "nests too deep"),
        (b'{"caption": "' + b"x" * 65_537 + b'"}', "more than 65536 bytes"),
        (b" " * 1_048_577, "more than 1048576 bytes"),
        ('{"caption": "狐"}'.encode("cp932"), "is not UTF-8"),
    ],
)
def test_json_that_cannot_be_used_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_caption(tmp_path / "a.json")
    assert words in caught.value.what
    assert str(caught.value).isprintable()
    assert caught.value.where == str(tmp_path / "a.json")

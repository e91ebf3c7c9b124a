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
    assert read_caption(tmp_path / "a.txt") == text


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

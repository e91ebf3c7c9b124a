import os
import unicodedata
from pathlib import Path

import pytest

from eri.printable import first_few, printable

HOSTILE = [
    ("\x1b[31mred", "\\x1b[31mred"),
    ("a\nb\r\tc", "a\\x0ab\\x0d\\x09c"),
    ("nul\0", "nul\\x00"),
    ("\x9b2J", "\\x9b2J"),
    ("\x1b]8;;http://x\x07", "\\x1b]8;;http://x\\x07"),
    ("photo\u202egnp.exe", "photo\\u202egnp.exe"),
    ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
    ("line\u2028separator", "line\\u2028separator"),
    ("tag\U000e0041", "tag\\U000e0041"),
    ("wide\u2003space", "wide\\u2003space"),
    ("of a font alone\ue800", "of a font alone\\ue800"),
    (os.fsdecode(b"latin-\xe9.png"), "latin-\\udce9.png"),
]


@pytest.mark.parametrize(("text", "shown"), HOSTILE)
def test_invisible_characters_become_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_visible_text_of_any_language_is_left_alone() -> None:
    text = "Jürgen 日本語 Ελληνικά 🦊 [/x] {y}"
    assert printable(text) == text


def test_nothing_invisible_comes_out() -> None:
    hidden = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}
    characters = [chr(code) for code in range(0x110000)]
    for character in characters:
        if unicodedata.category(character) in hidden and character != " ":
            assert printable(character).isascii()
            assert printable(character).isprintable()


def test_long_text_is_cut_and_the_rest_counted() -> None:
    assert printable("x" * 200) == "x" * 200
    assert printable("x" * 1205) == "x" * 200 + "…(+1005)"


def test_the_limit_counts_what_is_shown_and_never_splits_an_escape() -> None:
    assert printable("\x1b" * 100, limit=10) == "\\x1b\\x1b…(+98)"


def test_a_path_is_text() -> None:
    assert printable(Path("a") / "b\x07") == str(Path("a") / "b") + "\\x07"


def test_a_list_shows_its_first_items_and_counts_the_rest() -> None:
    assert first_few([]) == []
    assert first_few(["a\x1b", "b"]) == ["a\\x1b", "b"]
    assert first_few(list("abcde")) == list("abcde")
    assert first_few(list("abcdefg")) == [*"abcde", "and 2 more"]
    assert first_few([1, 2, 3], str, shown=1) == ["1", "and 2 more"]

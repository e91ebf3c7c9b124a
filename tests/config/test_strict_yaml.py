import math
import time

import pytest

from eri.config.strict_yaml import Document, parse, scalar
from eri.errors import ConfigError


def read(text: str) -> Document:
    return parse(text, lambda line, column: f"{line}:{column}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("~", None),
        ("null", None),
        ("nUll", "nUll"),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("7", 7),
        ("-7", -7),
        ("+7", 7),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("0.5", 0.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("1.10", 1.1),
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        ("1e4", 1e4),
        ("-1.5e+3", -1500.0),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("inf", "inf"),
        ("nan", "nan"),
        ("1,5", "1,5"),
        ("12:30:45", "12:30:45"),
        ("2026-11-20", "2026-11-20"),
        ("0o8", "0o8"),
        ("-0x1F", "-0x1F"),
        ("1e", "1e"),
        (".", "."),
        ("-", "-"),
        ("٣", "٣"),  # a digit, but of Arabic
        ("9" * 5000, "9" * 5000),
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    found = scalar(text)
    assert found == value
    assert type(found) is type(value)


def test_not_a_number_is_a_float() -> None:
    assert math.isnan(float(scalar(".nan") or 0))


def test_quoted_scalars_are_texts() -> None:
    assert read("[1e-4, '1e-4', \"true\", 'null']").value == [1e-4, "1e-4", "true", "null"]


def test_a_document_is_plain_python_and_knows_its_places() -> None:
    document = read("a: 1\nb:\n  - x\n  - {c: 2.5}\n")
    assert document.value == {"a": 1, "b": ["x", {"c": 2.5}]}
    assert document.problems == {}
    assert list(document.places.items()) == [
        ((), "1:1"),
        (("a",), "1:1"),
        (("b",), "2:1"),
        (("b", 0), "3:5"),
        (("b", 1), "4:5"),
        (("b", 1, "c"), "4:6"),
    ]
    assert document.place(("b", 1, "d", "e")) == "4:5"


@pytest.mark.parametrize("text", ["", "# a comment\n", "---\n", "null\n"])
def test_an_empty_text_is_nothing(text: str) -> None:
    assert read(text).value is None


@pytest.mark.parametrize(
    ("text", "path", "where", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", ("a",), "3:1", "key 'a' stands here and in line 1"),
        ("a: {b: 1, b: 2}\n", ("a", "b"), "1:11", "in line 1"),
        ("a: &x 1\n", ("a",), "1:4", "anchors"),
        ("a: *x\n", ("a",), "1:4", "aliases"),
        ("a: &x {b: 1}\n", ("a",), "1:4", "anchors"),
        ("<<: {a: 1}\n", ("<<",), "1:1", "merge keys"),
        ("a: !!str 5\n", ("a",), "1:4", "tags"),
        ("a: !!python/object/apply:os.system [x]\n", ("a",), "1:4", "tags"),
        ("a: ! x\n", ("a",), "1:4", "tags"),
        ('a: "\\ud800"\n', ("a",), "1:4", "surrogate"),
    ],
)
def test_what_surprises_is_refused_with_its_place(
    text: str, path: tuple[str, ...], where: str, words: str
) -> None:
    problem = read(text).problems[path]
    assert problem.where == where
    assert words in problem.what
    assert problem.hint


def test_of_two_equal_keys_the_rest_is_still_read() -> None:
    document = read("a: 1\na: {x: 1}\nb: 2\n")
    assert document.value == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ("a:\n\tb: 1\n", "2:1", "tab"),
        ("a: @x\n", "1:4", "cannot begin with @"),
        ("a: `x`\n", "1:4", "cannot begin with `"),
        ("a: %x\n", "1:4", "cannot begin with %"),
        ("a: b: c\n", "1:5", "colon"),
        ("a:\n  lr:1e-4\n  b: 5\n", "3:4", "colon"),
        ("a: {{x}}\n", "1:5", "key must be a word"),
        ("? [a]\n: b\n", "1:3", "key must be a word"),
        ("? *x\n: b\n", "1:3", "key must be a word"),
        ("a: [1, 2\nb: 3\n", "2:2", "bracket of line 1"),
        ("a: [x #1, y]\n", "2:1", "bracket of line 1"),
        ("a: 'x\n", "2:1", "quoted"),
        ('a: "C:\\Users"\n', "1:9", "escape"),
        ("a: 1\n---\nb: 2\n", "2:1", "second document"),
        ("a: 1\n...\nb: 2\n", "3:1", "document"),
        ("a: x\n b: \0\n", "2:5", "character '\\x00'"),
        ("a: \x1b[2J\n", "1:4", "character '\\x1b'"),
        ("a: " + "[" * 40, "1:37", "deeper than 32"),
        ("[" * 100_000, "1:34", "deeper than 32"),
        ("{a: " * 100_000, "1:133", "deeper than 32"),
        ("a: [" + "1, " * 20_000 + "]", "1:29999", "more than 10,000 values"),
        ("%YAML 3.0\n---\na: 1\n", "1:1", "not YAML"),
    ],
)
def test_what_is_not_yaml_is_refused_with_its_place(text: str, where: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert caught.value.where == where
    assert words in caught.value.what
    assert caught.value.what.isprintable()


@pytest.mark.parametrize(
    "nested", ["[" * 1000, "a: " + "[" * 600 + "\n", "{a: " * 250, "- " * 9000]
)
def test_nesting_without_reason_is_refused_at_once(nested: str) -> None:
    begun = time.thread_time()
    with pytest.raises(ConfigError, match="deeper than 32"):
        read(nested)
    assert time.thread_time() - begun < 0.05


def test_nesting_within_reason_is_read() -> None:
    value = read("[" * 32 + "x" + "]" * 32).value
    for _ in range(32):
        assert isinstance(value, list)
        value = value[0]
    assert value == "x"


@pytest.mark.parametrize(
    ("text", "commented"),
    [
        ("a: hello # tag\n", [("a",)]),
        ("a: #tag\n", []),
        ("a: [x,\n y #1\n ]\n", [("a", 1)]),
        ("a: 'hello' # fine\n", []),
        ("a: hello#tag\n", []),
        ("a: |\n  hello # tag\n", []),
        ("a: hello\n# below\n", []),
    ],
)
def test_a_comment_behind_an_unquoted_text_is_noticed(text: str, commented: list) -> None:
    document = read(text)
    assert [path for path in document.commented if document.value != {"a": None}] == commented

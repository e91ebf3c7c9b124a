"""YAML as people mean it: the core scalars of YAML 1.2 and nothing that surprises.

PyYAML scans the text; everything after that is done here, because its own loaders follow YAML 1.1
(`no` is false, `1e-4` is text, `12:30:45` is 45045), take the last of two equal keys, and let
aliases multiply a small file into a large one. Source: YAML 1.2.2, chapter 10.3 (core schema).
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import yaml
from yaml.reader import ReaderError
from yaml.scanner import ScannerError

from eri.errors import ConfigError
from eri.printable import printable

__all__ = ["Document", "KeyPath", "Problem", "parse", "scalar"]

KeyPath = tuple[str | int, ...]
"""Where a value stands: keys of mappings and indices of lists, from the top."""

MAX_DEPTH = 32
TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"
MAX_VALUES = 10_000  # of the whole document: mappings, lists and scalars
MAX_NUMBER_LENGTH = 64  # characters; Python takes quadratic time for longer ones, or refuses them

WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}
INTEGERS = (
    (re.compile(r"[-+]?[0-9]+"), 10),
    (re.compile(r"0o[0-7]+"), 8),
    (re.compile(r"0x[0-9a-fA-F]+"), 16),
)
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
COMMENT = re.compile(r"[ \t]+#")

QUOTE_HINT = "put the value in single quotes"
REASONS = {
    "\t": ("a tab stands where YAML wants spaces", "indent with spaces"),
    "@": ("a value cannot begin with @", QUOTE_HINT),
    "`": ("a value cannot begin with `", QUOTE_HINT),
    "%": ("a value cannot begin with %", QUOTE_HINT),
    ":": (
        "a colon stands where no key can be",
        'write "key: value" with a space after the colon, or put the value in single quotes',
    ),
}
"""What PyYAML stumbled over, by the character that it stopped at."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong: where it stands, what it is, and what to do."""

    where: str
    what: str
    hint: str | None = None


@dataclass(kw_only=True)
class Document:
    """A parsed text: its value in plain Python, and where each part of it stands.

    Args:
        value: mappings, lists and scalars; None for an empty text.
        places: for the top and for each key and list item, where it stands, in reading order.
        commented: unquoted texts with a comment behind them.
        problems: what is refused although it can be read.
    """

    value: object = None
    places: dict[KeyPath, str] = field(default_factory=dict)
    commented: list[KeyPath] = field(default_factory=list)
    problems: dict[KeyPath, Problem] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """Where `path` stands, or the nearest thing around it that was written down."""
        return next(
            self.places[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.places
        )


def scalar(text: str) -> str | int | float | bool | None:
    """The value of an unquoted scalar by the core schema of YAML 1.2."""
    if text in WORDS:
        return WORDS[text]
    if len(text) > MAX_NUMBER_LENGTH:
        return text
    for pattern, base in INTEGERS:
        if pattern.fullmatch(text):
            return int(text, base)
    return float(text) if FLOAT.fullmatch(text) else text


def parse(text: str, where: Callable[[int, int], str]) -> Document:
    """Parses one YAML document.

    Args:
        text: the document.
        where: makes the words for a place from its line and column, both counted from 1.

    Raises:
        ConfigError: the text is not YAML, holds a second document, is nested too deep, or has too
            many values.
    """
    composer = _Composer(text, where)
    composer.compose()
    return composer.document


class _TooDeepError(ScannerError):
    """Brackets in brackets in brackets."""


class _Loader(yaml.SafeLoader):
    """Stops at brackets nested too deep: PyYAML looks 1024 of them ahead, in quadratic time."""

    def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:
        if self.flow_level > MAX_DEPTH:
            raise _TooDeepError(problem=TOO_DEEP, problem_mark=self.get_mark())
        super().fetch_flow_collection_start(TokenClass)


class _Composer:
    """Builds a document from PyYAML's events."""

    def __init__(self, text: str, where: Callable[[int, int], str]) -> None:
        self.text = text
        self.where = where
        self.events = yaml.parse(text, Loader=_Loader)
        self.document = Document()
        self.values = 0

    def compose(self) -> None:
        self.document.places[()] = self.where(1, 1)
        self.next()  # the stream starts
        if isinstance(self.next(), yaml.StreamEndEvent):
            return
        self.document.value = self.value((), self.next())
        self.next()  # the document ends
        event = self.next()
        if not isinstance(event, yaml.StreamEndEvent):
            what = "a second document begins here; one is allowed"
            raise ConfigError(what, where=self.at(event), hint="remove the line with ---")

    def value(self, path: KeyPath, event: yaml.Event) -> object:
        self.refuse_indirection(path, event)
        self.values += 1
        if self.values > MAX_VALUES:
            raise ConfigError(f"more than {MAX_VALUES:,} values", where=self.at(event))
        if len(path) > MAX_DEPTH:
            raise ConfigError(TOO_DEEP, where=self.at(event))
        if isinstance(event, yaml.MappingStartEvent):
            return self.mapping(path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(path)
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(path, event)
        return None  # an alias, refused above

    def mapping(self, path: KeyPath) -> dict[str, object]:
        values: dict[str, object] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := self.next(), yaml.MappingEndEvent):
            key = self.key(event)
            below = (*path, key)
            if key == "<<":
                self.refuse(below, event, "merge keys (<<) are not allowed", "write the keys out")
            if key in values:
                what = f"the key '{printable(key)}' stands here and in line {lines[key]}"
                self.refuse(below, event, what, "keep one of the two")
                self.value(below, self.next())
                continue
            lines[key] = event.start_mark.line + 1
            self.document.places[below] = self.at(event)
            values[key] = self.value(below, self.next())
        return values

    def key(self, event: yaml.Event) -> str:
        if isinstance(event, yaml.ScalarEvent):
            return event.value
        what = "a key must be a word, not a mapping, a list or an alias"
        raise ConfigError(what, where=self.at(event), hint=QUOTE_HINT + " if braces belong to it")

    def sequence(self, path: KeyPath) -> list[object]:
        values: list[object] = []
        while not isinstance(event := self.next(), yaml.SequenceEndEvent):
            below = (*path, len(values))
            self.document.places[below] = self.at(event)
            values.append(self.value(below, event))
        return values

    def scalar(self, path: KeyPath, event: yaml.ScalarEvent) -> object:
        if any("\ud800" <= character <= "\udfff" for character in event.value):
            what = "half of a surrogate pair is no character"
            self.refuse(path, event, what, "write the character itself")
        if event.style is not None:
            return event.value
        if COMMENT.match(self.text, event.end_mark.index):
            self.document.commented.append(path)
        return scalar(event.value)

    def refuse_indirection(self, path: KeyPath, event: yaml.Event) -> None:
        if getattr(event, "anchor", None) is not None:
            what = "anchors (&) and aliases (*) are not allowed"
            self.refuse(path, event, what, "write the value out, or in single quotes")
        elif getattr(event, "tag", None) is not None:
            self.refuse(path, event, "tags (!) are not allowed", QUOTE_HINT + " if it is text")

    def refuse(self, path: KeyPath, event: yaml.Event, what: str, hint: str) -> None:
        problem = Problem(where=self.at(event), what=what, hint=hint)
        self.document.problems.setdefault(path, problem)

    def at(self, event: yaml.Event) -> str:
        return self.where(event.start_mark.line + 1, event.start_mark.column + 1)

    def next(self) -> yaml.Event:
        try:
            return next(self.events)
        except ReaderError as error:
            before = self.text[: error.position]
            line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
            what = f"the character '{printable(chr(error.character))}' is not allowed in YAML"
            raise ConfigError(what, where=self.where(line, column), hint="remove it") from error
        except yaml.MarkedYAMLError as error:
            raise self.syntax_error(error) from error
        except Exception as error:  # PyYAML's scanner leaks IndexError and others
            raise ConfigError("this is not YAML", where=self.where(1, 1)) from error

    def syntax_error(self, error: yaml.MarkedYAMLError) -> ConfigError:
        mark = error.problem_mark or error.context_mark
        if mark is None:
            return ConfigError(f"this is not YAML: {error.problem}", where=self.where(1, 1))
        stopped_at = self.text[mark.index : mark.index + 1]
        said = " ".join(part for part in (error.context, error.problem) if part)
        what, hint = f"this is not YAML: {printable(said)}", None
        if isinstance(error, _TooDeepError):
            what = TOO_DEEP
        elif isinstance(error, ScannerError) and stopped_at in REASONS:
            what, hint = REASONS[stopped_at]
        elif error.context_mark is not None and "flow" in said:
            what = (
                f"the bracket of line {error.context_mark.line + 1} is not closed as it should be"
            )
            hint = "close it; a # after a space begins a comment unless it stands in quotes"
        elif "escape" in said:
            hint = r"\ is special in double quotes; put the value in single quotes"
        return ConfigError(what, where=self.where(mark.line + 1, mark.column + 1), hint=hint)

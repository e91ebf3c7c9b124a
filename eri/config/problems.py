"""What pydantic found wrong, in words of our own: where, what was found, what is allowed."""

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from eri.config.schema import Config
from eri.config.section import settings
from eri.config.strict_yaml import Document, KeyPath, Problem
from eri.printable import printable

__all__ = ["schema_problems"]

ALLOWED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "a mapping of keys",
    "literal_error": "{expected}",
    "greater_than": "a number greater than {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number less than {lt:,}",
    "less_than_equal": "a number of at most {le:,}",
    "multiple_of": "a multiple of {multiple_of:g}",
    "value_error": "{error}",
}
"""What is allowed, by pydantic's type of error."""


def schema_problems(error: ValidationError, document: Document) -> dict[KeyPath, Problem]:
    """Every problem with the settings of a document, by the path of the setting.

    Alternatives of one setting (`auto` or a number) come as several errors and are told as one.
    """
    grouped: dict[KeyPath, list[Any]] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] != "default_factory_not_called":  # a consequence of another error
            grouped.setdefault(_path_of(detail, document.value), []).append(detail)
    return {path: _problem(path, details, document) for path, details in grouped.items()}


def _path_of(detail: Any, value: Any) -> KeyPath:
    """The part of pydantic's location that stands in the document.

    The rest names alternatives of a type, or what a short form stands for.
    """
    location: KeyPath = detail["loc"]
    if detail["type"] in {"missing", "extra_forbidden"}:
        return location
    path: KeyPath = ()
    for step in location:
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            break
        path = (*path, step)
    return path


def _problem(path: KeyPath, details: Sequence[Any], document: Document) -> Problem:
    where = document.place(path)
    keys = tuple(step for step in path if isinstance(step, str))
    dotted = printable(".".join(map(str, path)))
    hint = next((field.description for known, field in settings(Config) if known == keys), None)
    kind = details[0]["type"]
    if kind == "missing":
        return Problem(where=where, what=f"{dotted} is missing", hint=f"{dotted}: {hint}")
    if kind == "extra_forbidden":
        return _unknown_key(where, dotted, keys)
    allowed = " or ".join(dict.fromkeys(_allowed(detail) for detail in details))
    what = f"{dotted} is {_shown(details[0]['input'])}; allowed: {allowed}"
    return Problem(where=where, what=what, hint=f"{dotted}: {hint}")


def _unknown_key(where: str, dotted: str, keys: tuple[str, ...]) -> Problem:
    *section, key = keys
    known = [path for path, _ in settings(Config)]
    siblings = [path[-1] for path in known if path[:-1] == tuple(section)]
    elsewhere = [path for path in known if path[-1] == key]
    close = difflib.get_close_matches(key.lower(), siblings, n=1, cutoff=0.0)
    nearest = elsewhere[0] if elsewhere else (*section, *close)
    what = f"unknown key {dotted}; did you mean {'.'.join(nearest)}?"
    return Problem(where=where, what=what, hint=f"allowed here: {', '.join(siblings)}")


def _allowed(detail: Any) -> str:
    template = ALLOWED.get(detail["type"])
    return template.format(**detail.get("ctx", {})) if template else detail["msg"]


def _shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"'{printable(value, limit=60)}'"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return printable(str(value), limit=60)

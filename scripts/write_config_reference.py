"""Writes docs/configuration.md, the reference of every setting, from the settings themselves.

python scripts/write_config_reference.py
"""

import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from eri.config.schema import Config
from eri.config.section import Section, settings

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
OPENING = """# Configuration

A config is a YAML file; two keys are enough, `model:` and `data:`. `eri init photos/` writes one to
begin with, and `eri train --model FILE --data photos/` does without. Any setting can be overridden
on the command line: `eri train my.yaml --set train.lr=2e-4`. Unknown keys are refused with their
line and the nearest known key. Paths are relative to the current folder. A run keeps all of its
settings, each below what it means, in `config.yaml` in its folder.

Written by `scripts/write_config_reference.py` from the settings in
`eri/config/schema.py` and `eri/config/sources.py`; change them there.

| key | what is allowed | default | what it means |
|---|---|---|---|
"""
NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", NoneType: "null"}
SIGNS = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}


def page() -> str:
    """The whole page."""
    rows = (row(key, field) for key, field in settings(Config) if not is_section(field.annotation))
    return OPENING + "".join(rows)


def row(key: tuple[str, ...], field: FieldInfo) -> str:
    """One setting as a row of the table."""
    allowed = " or ".join(kinds(field.annotation))
    limits = " ".join(limit(mark) for mark in field.metadata if limit(mark))
    cells = (f"`{'.'.join(key)}`", f"{allowed} {limits}".strip(), default(field), field.description)
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |\n"


def kinds(annotation: Any) -> list[str]:
    """The types and words that an annotation allows."""
    origin = get_origin(annotation)
    if origin is Literal:
        return [f"`{word}`" for word in get_args(annotation)]
    if origin in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in kinds(part)]
    if origin is Annotated:
        inner, *marks = get_args(annotation)
        limits = " ".join(limit(mark) for mark in marks if limit(mark))
        return [f"{kinds(inner)[0]} {limits}".strip()]
    if origin is tuple:
        return [f"list of {kinds(get_args(annotation)[0])[0]}"]
    return [NAMES.get(annotation, "path")]


def limit(mark: Any) -> str:
    """A limit in a sign and a number; nothing for what is no limit."""
    if isinstance(mark, FieldInfo):
        return " ".join(limit(inner) for inner in mark.metadata if limit(inner))
    if isinstance(mark, MultipleOf):
        return f"multiple of {mark.multiple_of}"
    for kind, (sign, name) in SIGNS.items():
        if isinstance(mark, kind):
            return f"{sign} {getattr(mark, name):g}"
    return ""


def default(field: FieldInfo) -> str:
    """What a setting is when nothing is said."""
    if field.is_required():
        return "–"
    if field.default is PydanticUndefined:
        return "derived"
    value = field.default
    if value is None:
        return "`null`"
    if isinstance(value, tuple):
        return "`[]`"
    return (
        f"`{str(value).lower() if isinstance(value, bool) else value}`" if value != "" else "`''`"
    )


def is_section(annotation: Any) -> bool:
    """Whether settings stand below this one."""
    parts = (annotation, *get_args(annotation))
    return any(isinstance(part, type) and issubclass(part, Section) for part in parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE, file=sys.stderr)

"""What a group of settings is, and the types of setting that several groups have."""

import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic.fields import FieldInfo

__all__ = ["FolderPath", "PathText", "Section", "settings", "to_path"]


class Section(BaseModel):
    """A group of settings: unknown keys are refused, types are not converted, nothing changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


# A validator's ValueError says what is allowed; the loader says what was found and where.


def _path_text(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, str) or not value:
        raise ValueError("a path")
    if any(unicodedata.category(character) == "Cc" for character in value):
        raise ValueError(r"a path in single quotes (in double quotes \n and \t are escapes)")
    if value.startswith("~"):
        raise ValueError("the whole path (~ stands for your home in a shell only)")
    return value


def to_path(value: object) -> Path:
    """A path as a setting may give it.

    Raises:
        ValueError: it is none; says what is allowed.
    """
    return Path(str(_path_text(value)))


PathText = Annotated[str, BeforeValidator(_path_text)]
FolderPath = Annotated[Path, BeforeValidator(to_path, json_schema_input_type=str)]


def settings(
    section: type[Section], prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every setting below `section`: its path of keys (without list indices) and its field."""
    for name, field in section.model_fields.items():
        below = _section_in(field.annotation)
        yield (*prefix, name), field
        if below is not None:
            yield from settings(below, (*prefix, name))


def _section_in(annotation: Any) -> type[Section] | None:
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)

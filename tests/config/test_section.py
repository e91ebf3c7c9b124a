from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from eri.config.section import FolderPath, PathText, Section, settings, to_path


class Inner(Section):
    """Settings below others."""

    count: int = Field(default=1, description="how many")


class Outer(Section):
    """Settings of every kind."""

    inner: Inner = Field(default=Inner(), description="a group")
    several: tuple[Inner, ...] = Field(default=(), description="groups")
    folder: FolderPath = Field(default=Path("x"), description="a folder")
    text: PathText | None = Field(default=None, description="a path or nothing")


def test_settings_are_found_below_groups_and_lists_of_groups() -> None:
    assert [path for path, _ in settings(Outer)] == [
        ("inner",),
        ("inner", "count"),
        ("several",),
        ("several", "count"),
        ("folder",),
        ("text",),
    ]


@pytest.mark.parametrize(
    "content", [{"bogus": 1}, {"inner": {"count": 1.0}}, {"inner": {"count": "1"}}, {"folder": 3}]
)
def test_unknown_keys_and_other_types_are_refused(content: dict) -> None:
    with pytest.raises(ValidationError):
        Outer.model_validate(content)


def test_a_section_does_not_change() -> None:
    with pytest.raises(ValidationError):
        Outer().folder = Path("y")  # type: ignore[misc]


@pytest.mark.parametrize("path", ["photos", "../a b", "C:\\x", "狐"])
def test_a_path_stays_as_it_is_written(path: str) -> None:
    assert to_path(path) == Path(path) == to_path(Path(path))
    assert Outer.model_validate({"folder": path}).folder == Path(path)
    assert Outer.model_validate({"text": path}).text == path


@pytest.mark.parametrize(
    ("path", "allowed"),
    [("", "a path"), (3, "a path"), ("a\nb", "single quotes"), ("~/x", "the whole path")],
)
def test_what_is_no_path_is_refused_with_what_is_allowed(path: object, allowed: str) -> None:
    with pytest.raises(ValueError, match=allowed):
        to_path(path)
    with pytest.raises(ValidationError, match=allowed):
        Outer.model_validate({"text": path})

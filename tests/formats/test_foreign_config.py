"""Configs of other programs: every field that is read is checked, every other one is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eri.errors import ModelError
from eri.formats.foreign_config import ForeignConfig


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., ForeignConfig]:
    def build(**values: Any) -> ForeignConfig:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(values))
        return ForeignConfig(path)

    return build


def test_reads_each_kind(config: Callable[..., ForeignConfig]) -> None:
    found = config(a=3, b=[1, 2], c=0.5, d="x", e=["x", "y", "x"], f=True, g=None)
    assert found.integer("a", at_most=3) == 3
    assert found.integer("g", default=2, at_most=3) == 2
    assert found.integers("b", count=2, default=1, at_most=9) == (1, 2)
    assert found.integers("a", count=2, default=1, at_most=9) == (3, 3)
    assert found.number("c", between=(0, 1)) == 0.5
    assert found.choice("d", ["x", "y"]) == "x"
    assert found.words("e", ["x", "y"]) == ("x", "y", "x")
    assert found.flag("f", default=False) is True
    assert found.flag("none", default=False) is False


@pytest.mark.parametrize(
    "read",
    [
        lambda c: c.integer("value", at_most=10),
        lambda c: c.integers("value", count=2, default=1, at_most=10),
        lambda c: c.number("value", between=(0, 1)),
        lambda c: c.choice("value", ["x", "y"]),
        lambda c: c.words("value", ["x", "y"]),
        lambda c: c.flag("value", default=False),
    ],
    ids=["integer", "integers", "number", "choice", "words", "flag"],
)
@pytest.mark.parametrize(
    "value", [-1, 11, "z", [], [1, 2, 3], ["x", 1], {"x": 1}, ["x"] * 9, [[1], [2]], 10**400, 0]
)
def test_refuses_other_values_by_name(
    config: Callable[..., ForeignConfig], read: Callable[[ForeignConfig], Any], value: Any
) -> None:
    with pytest.raises(ModelError, match=r"^value is .*supported is .*config\.json"):
        read(config(value=value))


def test_a_field_without_default_must_be_there(config: Callable[..., ForeignConfig]) -> None:
    with pytest.raises(ModelError, match="value is missing, supported is a whole number"):
        config().integer("value", at_most=3)


def test_unknown_fields_are_listed_together(config: Callable[..., ForeignConfig]) -> None:
    found = config(read=1, fine=False, fine_null=None, _note=1, off=True, new="x\x1b")
    with pytest.raises(ModelError, match="2 things") as refused:
        found.require_known({"fine": (False,), "off": (False,)}, ["read"])
    assert refused.value.problems == (
        "off is True, supported is False",
        "new is 'x\\x1b', supported is none",
    )
    config(read=1, fine=False, _note=1).require_known({"fine": (False,)}, ["read"])

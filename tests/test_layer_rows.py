"""Every row of the two documents is implemented and tested, and docs/layers.md says where."""

import pkgutil
import re
from pathlib import Path

import pytest
import yaml

from scripts import write_layer_rows
from scripts.write_layer_rows import PAGE, Row, names_of_tests, page, places, rows

ROOT = Path(__file__).parents[1]
DOCUMENTED = {
    "A": "1-7 10-16 20-31 35-43 45-50 52-56 58-60 62-68 70-76 80-85 90-103 110-118 120-124 130-134 "
    "140-149",
    "B": "1-53",
}
CHECKLIST = {f"c{number:03d}" for number in range(1, 109)}
SHEET = yaml.safe_load((ROOT / "docs/layer_rows.yaml").read_text(encoding="utf-8"))
PROMISED = rows(SHEET["rows"], places(), names_of_tests())
DECIDED = rows(SHEET["decisions"], {}, names_of_tests())


def documented() -> list[str]:
    """The numbers of all rows, in their order."""
    spans = [
        (letter, *map(int, span.split("-")))
        for letter, text in DOCUMENTED.items()
        for span in text.split()
    ]
    return [f"{letter}{n:02d}" for letter, first, last in spans for n in range(first, last + 1)]


def on_checklist(tests: list[str]) -> set[str]:
    """The checklist's numbers that the names of tests carry."""
    return {number for test in tests for number in re.findall(r"_(c\d{3})(?=_)", test)}


def absent(markdown: str, tests: list[str]) -> set[str]:
    """The dotted names and tests that a page names and that do not exist."""
    named = set(re.findall(r"`(eri\.[\w.]+|tests/[\w/.]+::\w+)`", markdown))
    return {name for name in named if name not in tests and not importable(name)}


def importable(name: str) -> bool:
    """Whether a dotted name leads to something."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError):
        return False
    return True


def test_every_documented_row_is_promised_once() -> None:
    assert len(documented()) == 112 + 53
    assert [row.number for row in PROMISED] == documented()
    assert [row.number for row in DECIDED] == [f"D{number}" for number in range(1, 17)]


@pytest.mark.parametrize("row", PROMISED, ids=lambda row: row.number)
def test_row_is_implemented_and_tested(row: Row) -> None:
    assert row.promise
    assert row.places, "no docstring of eri.layers or eri.models claims this row"
    assert row.tests


@pytest.mark.parametrize("row", DECIDED, ids=lambda row: row.number)
def test_decision_is_said_and_tested(row: Row) -> None:
    assert row.promise.endswith(".")
    assert row.tests


def test_docstrings_claim_no_other_rows() -> None:
    assert set(places()) <= set(documented())


def test_every_line_of_the_checklist_has_a_test() -> None:
    assert not CHECKLIST - on_checklist(names_of_tests())
    assert on_checklist(["tests/test_a.py::test_c001_c002_x", "tests/test_a.py::test_cc003"]) == {
        "c001",
        "c002",
    }


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run scripts/write_layer_rows.py"


def test_page_names_what_exists() -> None:
    markdown = PAGE.read_text(encoding="utf-8")
    assert not absent(markdown, names_of_tests())
    assert markdown.count("`eri.layers.Linear`") > 1
    assert absent("`eri.layers.Lineal` `tests/a.py::test_b` `eri.layers.Linear`", []) == {
        "eri.layers.Lineal",
        "tests/a.py::test_b",
    }


def test_a_row_without_place_or_test_is_noticed() -> None:
    tests = ["tests/test_a.py::test_c001_x", "tests/test_a.py::test_c0010"]
    (row,) = rows({"A01": ["promise", "c001_"]}, {"A02": ["eri"]}, tests)
    assert (row.places, row.tests) == ([], tests[:1])
    (row,) = rows({"A01": ["promise"]}, {"A01": ["eri"]}, tests)
    assert (row.places, row.tests) == (["eri"], [])
    with pytest.raises(ValueError, match="A01: no test is named test_c002"):
        rows({"A01": ["promise", "c001", "c002"]}, {}, tests)


@pytest.mark.parametrize(
    ("line", "numbers"),
    [
        ("Seed rows: A07.", ["A07"]),
        ("Seed rows: A09–A11, B99–B101.", ["A09", "A10", "A11", "B99", "B100", "B101"]),
    ],
)
def test_claims_are_read(line: str, numbers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    docstring = f"What it is.\n\n    {line}\n"
    monkeypatch.setattr(write_layer_rows, "_docstrings", lambda: [("eri.x", docstring)])
    assert places() == {number: ["eri.x"] for number in numbers}


@pytest.mark.parametrize(
    "line", ["Seed row: A07.", "Seed rows: A07", "Seed rows: A7-A9.", "Many words. Seed rows: A07."]
)
def test_claims_in_another_form_are_refused(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_layer_rows, "_docstrings", lambda: [("eri.x", line)])
    with pytest.raises(ValueError, match=r"eri\.x: expected a line like 'Seed rows"):
        places()

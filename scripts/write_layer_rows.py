"""Writes docs/layers.md: each row of the two documents, where it is implemented, what proves it.

    .venv/bin/python scripts/write_layer_rows.py

The promises and the beginnings of test names stand in docs/layer_rows.yaml. The places come from
the docstrings of eri.layers and eri.models, the tests from the files under tests/.
"""

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import yaml

import eri.layers
import eri.models

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/layers.md"
PACKAGES = (eri.layers, eri.models)

INTRODUCTION = """\
# The layers, row by row

<!-- Written by scripts/write_layer_rows.py from docs/layer_rows.yaml and the docstrings. -->

`eri.layers` and the blocks of `eri.models` implement two documents. Document A describes the layers
that FLAME, a Rust library, offers to a diffusion trainer; document B describes the layers of a Go
library for Metal. Every row below is one promise of theirs (docstrings call them seed rows), with
the class or function that keeps it and the tests that would fail if it were broken. The numbers
c001 to c108 in the names of tests are those of a checklist over both documents.
`scripts/test tests/layers tests/models` runs them, on a machine with a GPU there too.
"""


class Row(NamedTuple):
    """One promise.

    Args:
        number: `A12`, `B03` or `D4`.
        promise: in a few words.
        places: dotted names of what implements it.
        tests: `path::name` of what proves it.
    """

    number: str
    promise: str
    places: list[str]
    tests: list[str]


def places() -> dict[str, list[str]]:
    """Row number to the dotted names whose docstrings claim it.

    Raises:
        ValueError: a docstring speaks of seed rows in another form than `Seed rows: A01, B02–B04.`
    """
    found: dict[str, list[str]] = {}
    for name, docstring in _docstrings():
        for line in docstring.splitlines():
            if "Seed row" in line:
                for number in _numbers(line.strip(), name):
                    found.setdefault(number, []).append(name)
    return found


def _docstrings() -> Iterator[tuple[str, str]]:
    """The public name and the docstring of every module, class and function of the packages."""
    for package in PACKAGES:
        yield package.__name__, package.__doc__ or ""
        for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            module = importlib.import_module(info.name)
            yield module.__name__, module.__doc__ or ""
            for name, value in vars(module).items():
                defined = inspect.isclass(value) or inspect.isfunction(value)
                if defined and value.__module__ == module.__name__:
                    yield _public_name(package, module, name), value.__doc__ or ""


def _public_name(package: ModuleType, module: ModuleType, name: str) -> str:
    owner = package if name in package.__all__ else module
    return f"{owner.__name__}.{name}"


def _numbers(line: str, name: str) -> Iterator[str]:
    """The row numbers of one `Seed rows: …` line."""
    one = r"[AB]\d+(?:–[AB]\d+)?"
    if not re.fullmatch(rf"Seed rows: {one}(?:, {one})*\.", line):
        raise ValueError(f"{name}: expected a line like 'Seed rows: A01, B02–B04.', found {line!r}")
    for first, last in re.findall(r"([AB]\d+)(?:–([AB]\d+))?", line):
        end = last or first
        width = len(first) - 1
        for number in range(int(first[1:]), int(end[1:]) + 1):
            yield f"{first[0]}{number:0{width}d}"


def names_of_tests() -> list[str]:
    """`path::name` of every test function of the repository."""
    return [
        f"{path.relative_to(ROOT).as_posix()}::{node.name}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def rows(
    entries: Mapping[str, list[str]], places: Mapping[str, list[str]], tests: list[str]
) -> list[Row]:
    """The rows of one section of docs/layer_rows.yaml.

    Raises:
        ValueError: no test begins as an entry says.
    """
    return [
        Row(
            number,
            promise,
            places.get(number, []),
            sorted({test for start in starts for test in _tests_of(number, start, tests)}),
        )
        for number, (promise, *starts) in entries.items()
    ]


def _tests_of(number: str, start: str, tests: list[str]) -> list[str]:
    found = [test for test in tests if test.partition("::")[2].startswith(f"test_{start}")]
    if not found:
        raise ValueError(f"{number}: no test is named test_{start}…")
    return found


def page() -> str:
    """The whole page."""
    sheet = yaml.safe_load((ROOT / "docs/layer_rows.yaml").read_text(encoding="utf-8"))
    where, tests = places(), names_of_tests()
    promised = rows(sheet["rows"], where, tests)
    sections = [
        INTRODUCTION,
        "## Shapes\n\n" + _explanation("eri.layers.layout"),
        "## Attention masks\n\n" + _explanation("eri.layers.mask"),
        "## Decided where the documents are silent\n\n"
        + _table(rows(sheet["decisions"], {}, tests), with_places=False),
        *(
            f"## Document {letter}\n\n"
            + _table([row for row in promised if row.number[0] == letter], with_places=True)
            for letter in "AB"
        ),
    ]
    return "\n".join(sections)


def _explanation(module: str) -> str:
    """The docstring of a module below its first line."""
    _, _, rest = inspect.getdoc(importlib.import_module(module)).partition("\n\n")
    return rest + "\n"


def _table(rows: list[Row], *, with_places: bool) -> str:
    head = ["row", "promise", *(["where"] if with_places else []), "tests"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        where = [_code(row.places)] if with_places else []
        lines.append(_line([row.number, row.promise, *where, _code(row.tests)]))
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _code(names: list[str]) -> str:
    return "<br>".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

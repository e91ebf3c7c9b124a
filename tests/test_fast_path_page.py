"""docs/speed-and-memory.md: the table of what leaves the fast path says what the code does."""

import ast
import inspect
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from eri.layers import cross_attention, layer_norm, lora_products, narrow, rope, scale_rows
from eri.layers.backend import OLDEST
from eri.models.lean import RECOMPUTE
from eri.run.fast_path import leaves_fast_path
from eri.train import MOST
from scripts.benchmark.__main__ import parser
from scripts.benchmark.eri_case import checked
from scripts.benchmark.kernel_shapes import NETS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/speed-and-memory.md").read_text(encoding="utf-8")
PART = PAGE.partition("## What leaves the fast path")[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PART.splitlines()
    if line.startswith("| ") and not line.startswith("| **")
][1:]
COMMANDS = PART.partition("```")[2].partition("```")[0].replace("\\\n", " ").strip().splitlines()


def test_each_row_names_its_code() -> None:
    assert len(ROWS) > 20
    for row in ROWS:
        assert len(row) == 5, row
        names = re.findall(r"`([\w.]+)`", row[4])
        assert names, row
        for name in names:
            module, _, what = name.rpartition(".")
            assert hasattr(import_module(module), what), name


def test_every_operation_with_a_reference_has_a_row() -> None:
    named = " ".join(row[4] for row in ROWS)
    for path in (ROOT / "eri/layers").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(one, ast.FunctionDef) and one.name == "unsupported" for one in tree.body):
            assert f"`eri.layers.{path.stem}.unsupported`" in named, path.stem


def test_every_line_of_a_plan_has_a_row() -> None:
    told = [row[2] for row in ROWS]
    tree = ast.parse(inspect.getsource(leaves_fast_path)).body[0]
    strings = [one.value for one in ast.walk(tree) if isinstance(one, ast.Constant)]
    lines = [text for text in strings if isinstance(text, str) and " " in text][1:]  # no docstring
    assert len(lines) >= 6
    for line in lines:
        assert f"plan: {line}" in told, line


def test_its_numbers_are_those_of_the_code() -> None:
    first = " ".join(row[0] for row in ROWS)
    most = lora_products.MOST_RANKS
    assert f"more than {MOST} shapes" in first
    assert f"more than {cross_attention.FEW_KEYS} words" in first
    assert "{}, {}, {} or {}".format(*cross_attention.SIZES) in first
    assert f"tokens wider than {8 * layer_norm.MOST_VECTORS}" in first
    assert f"rows wider than {8 * scale_rows.MOST_VECTORS}" in first
    assert f"norms wider than {narrow.MOST_WIDTH}" in first
    ranks = narrow.MOST_RANKS // 3 // 8 * 8, narrow.MOST_RANKS
    assert "above {} for queries, keys and values, above {} for".format(*ranks) in first
    assert rope.MOST_POSITIONS == 2**24 and "2²⁴ positions" in first
    assert f"more than {most} ranks" in first
    together = 2 * max(level.together for level in NETS["sdxl"].levels)
    for layers in (3, together, 2):  # queries, keys and values; words of SDXL and of SD1.5
        assert re.search(rf"\b{most // layers // 8 * 8}\b", first)
    assert f"(SDXL, {together} layers)" in first
    assert "older than sm_{}{}".format(*OLDEST) in first
    assert all(one.split("-")[0] in first for one in RECOMPUTE[1:])


def test_each_unknown_cost_has_its_command() -> None:
    letters = {letter for row in ROWS for letter in re.findall(r"\((\w)\)", row[3])}
    assert letters == {command.rpartition("# ")[2] for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.rpartition("# ")[2])
def test_the_commands_can_be_given(command: str) -> None:
    words = shlex.split(command, comments=True)
    if "scripts/bench" not in words:
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
        return
    options = parser().parse_args(words[words.index("scripts/bench") + 1 :])
    for case in getattr(options, "cases", ()):
        told = case.partition(":")[2]
        checked(dict(part.split("=") for part in told.split(",")) if told else {})

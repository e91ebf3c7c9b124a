"""The papers tell the truth: layout, commands, paths, shipped configs and the version."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import eri
from eri.config import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def code_in(markdown: str) -> list[str]:
    """The fenced blocks and inline code spans of a Markdown text."""
    fenced = re.findall(r"```.*?\n(.*?)```", markdown, flags=re.DOTALL)
    rest = re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)
    return fenced + re.findall(r"`([^`\n]+)`", rest)


def layout(markdown: str) -> set[str]:
    """The paths drawn in the block under the "Layout" heading.

    A line is some names, then two spaces or more, then what they are for; deeper lines stand in the
    last folder above them that is indented less.
    """
    found = re.search(r"^#+ [^\n]*layout.*?```\w*\n(.*?)```", markdown, flags=re.S | re.M | re.I)
    assert found, 'README.md has no fenced block under a "Layout" heading'
    paths: set[str] = set()
    parents: list[tuple[int, str]] = []
    for line in found[1].splitlines():
        drawn = re.sub(r"[│├└─]", " ", line)
        indent = len(drawn) - len(drawn.lstrip())
        names = re.split(r"\s{2,}", drawn.strip())[0].split()
        parents = [(depth, folder) for depth, folder in parents if depth < indent]
        folder = parents[-1][1] if parents else ""
        paths |= {folder + name for name in names}
        if names and names[-1].endswith("/"):
            parents.append((indent, folder + names[-1]))
    return paths


def left_out(drawn: set[str], tracked: list[str]) -> set[str]:
    """Folders and Python files that stand in a drawn folder and are not drawn themselves."""
    opened = {"", *(path for path in drawn if any(p != path and p.startswith(path) for p in drawn))}
    missing = set()
    for path in tracked:
        parts = path.split("/")
        for depth, name in enumerate(parts):
            folder = "".join(part + "/" for part in parts[:depth])
            is_folder = depth < len(parts) - 1
            if folder not in opened or name.startswith((".", "__")):
                break
            shown = folder + name + "/" * is_folder
            if (is_folder or name.endswith(".py")) and shown not in drawn:
                missing.add(shown)
    return missing


def test_layout_names_what_is_on_disk() -> None:
    absent = {path for path in layout(README) if not (ROOT / path).exists()}
    assert not absent


def test_layout_leaves_nothing_out() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not left_out(layout(README), tracked)


def test_layout_check_sees_both_ways() -> None:
    drawn = layout(
        "## The layout\n```\neri/\n  a.py b.py   two files\n  c/      more\ndocs/\n```\n"
    )
    assert drawn == {"eri/", "eri/a.py", "eri/b.py", "eri/c/", "docs/"}
    assert left_out(drawn, ["eri/a.py", "eri/c/x.py", "docs/d/e.md", "README.md"]) == set()
    assert left_out(drawn, ["eri/new.py", "tests/x.py", "eri/d/x.cu", ".ci/run"]) == {
        "eri/new.py",
        "tests/",
        "eri/d/",
    }


@pytest.mark.parametrize("paper", ["README.md", "CONTRIBUTING.md"])
def test_named_paths_exist(paper: str) -> None:
    code = "\n".join(code_in((ROOT / paper).read_text(encoding="utf-8")))
    named = set(re.findall(r"(?<![\w/.-])(?:scripts|configs|docs|eri|tests|\.ci)/[\w./-]*\w", code))
    assert not {path for path in named if not (ROOT / path).exists()}


@pytest.mark.parametrize(
    "verb", sorted(set(re.findall(r"\beri ([a-z][a-z-]+)", "\n".join(code_in(README)))))
)
def test_named_command_exists(verb: str) -> None:
    done = subprocess.run([sys.executable, "-m", "eri", verb, "--help"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_config_is_valid_and_opens_with_its_command(path: Path) -> None:
    load_config(path)
    opening = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
    assert opening and f"configs/{path.name}" in opening[0]


def test_some_config_is_shipped() -> None:
    assert ROOT / "configs/quickstart.yaml" in CONFIGS


def test_changelog_opens_with_the_version() -> None:
    versions = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert versions[0] == eri.__version__

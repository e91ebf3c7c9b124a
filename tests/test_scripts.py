"""The scripts that people and CI run: they parse, can be run, and say what a machine lacks."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = ("quickstart", "test", "check", "fix", "audit", "verify-real", "torture", "build-wheel")
RUNNABLE = [*(f"scripts/{name}" for name in NAMES), ".ci/run"]
BASH = shutil.which("bash") or "/bin/bash"


@pytest.mark.parametrize("script", RUNNABLE)
def test_script_parses_and_can_be_run(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run([BASH, "-n", ROOT / script], check=True)


def test_the_tests_of_a_file_run_in_one_worker(request: pytest.FixtureRequest) -> None:
    """The scheduler of pytest-xdist reads the group behind the name; see tests/conftest.py."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("no worker of scripts/test")
    assert request.node.nodeid.endswith("::test_the_tests_of_a_file_run_in_one_worker@test_scripts")


def put_python(folder: Path, name: str, *, version: str, new_enough: bool, venv: bool) -> None:
    """A stand-in for a Python: answers the version, the age check and the import of venv."""
    stub = folder / name
    stub.write_text(
        "#!/bin/sh\n"
        f'case "$*" in -V) echo "Python {version}";;'
        f" *version_info*) exit {int(not new_enough)};; *ensurepip*) exit {int(not venv)};; esac\n"
    )
    stub.chmod(0o755)


def find_python(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [BASH, "-euo", "pipefail", "-c", "source scripts/venv.sh; find_python"]
    return subprocess.run(
        command, cwd=ROOT, env={"PATH": str(folder)}, capture_output=True, text=True
    )


def test_without_python_one_line_says_so(tmp_path: Path) -> None:
    done = find_python(tmp_path)
    assert done.returncode == 1
    assert done.stderr == "eri: error: Python 3.11 or newer is needed, found none\n"


def test_an_old_python_is_named(tmp_path: Path) -> None:
    put_python(tmp_path, "python3", version="3.9.2", new_enough=False, venv=True)
    done = find_python(tmp_path)
    assert done.returncode == 1
    assert done.stderr == "eri: error: Python 3.11 or newer is needed, found Python 3.9.2\n"


def test_a_missing_venv_module_comes_with_its_cure(tmp_path: Path) -> None:
    put_python(tmp_path, "python3", version="3.12.3", new_enough=True, venv=False)
    done = find_python(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("eri: error: Python 3.12.3 has no venv module; on Debian")
    assert done.stderr.count("\n") == 1


def test_a_newer_python_beside_an_old_one_is_found(tmp_path: Path) -> None:
    put_python(tmp_path, "python3", version="3.9.2", new_enough=False, venv=True)
    put_python(tmp_path, "python3.12", version="3.12.3", new_enough=True, venv=True)
    done = find_python(tmp_path)
    assert done.returncode == 0
    assert done.stdout.strip() == str(tmp_path / "python3.12")
    assert done.stderr == ""


def audit_with(folder: Path, *, code: int, pin: str) -> list[str]:
    """Runs a copy of scripts/audit with a stand-in for pip-audit; the calls that it took down."""
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=lambda *_: ["benchmark"])
    shutil.copy(ROOT / "constraints.txt", folder)
    tools = folder / "build" / "audit"
    (tools / "bin").mkdir(parents=True)
    (tools / "installed").write_text(f"{pin}\n")
    calls = folder / "calls"
    for path in (tools / "bin" / "pip-audit", tools / "bin" / "python", folder / "python3"):
        path.write_text(f'#!/bin/sh\necho "{path.name} $*" >>{calls}\nexit {code}\n')
        path.chmod(0o755)
    done = subprocess.run(
        [folder / "scripts" / "audit", "--format", "json"],
        env={"PATH": f"{folder}:/usr/bin:/bin"},
        capture_output=True,
    )
    assert done.returncode == code
    return calls.read_text().splitlines()


PINS = (ROOT / "constraints.txt").read_text().splitlines()
PIN = next(line for line in PINS if line.startswith("pip-audit=="))


@pytest.mark.parametrize("code", [0, 1])
def test_an_audit_looks_at_every_pin_and_ends_as_it_found(tmp_path: Path, code: int) -> None:
    (call,) = audit_with(tmp_path, code=code, pin=PIN)
    expected = "--requirement constraints.txt --no-deps --disable-pip --strict --format json"
    assert call == f"pip-audit {expected}"


def test_an_audit_by_another_version_makes_its_tools_anew(tmp_path: Path) -> None:
    calls = audit_with(tmp_path, code=0, pin="pip-audit==1.0")
    made, installed, audited = [call for call in calls if not call.startswith("python3 -c")]
    assert made == "python3 -m venv --clear build/audit"
    assert installed.startswith("python -m pip") and installed.endswith(PIN)
    assert audited.startswith("pip-audit ")


def test_one_lock_file_pins_everything_exactly() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(line.count("==") == 1 and "+" not in line and "/" not in line for line in pins)
    names = {line.split("==")[0].lower() for line in pins}
    assert len(names) == len(pins)
    assert {"torch", "diffusers", "transformers", "pytest", "ruff", "pyright"} <= names

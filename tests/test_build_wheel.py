"""The wheel: what is in it, how it is called, and that it works where there is no compiler.

Its library is a stand-in; that the real one is built and runs takes minutes, nvcc and a GPU.
"""

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename

import eri
from eri.files import commit_folder
from eri.layers.build import STABLE_ABI, source_hash
from eri.layers.prebuilt import LIBRARY, identity_of
from eri.layers.toolchain import Lack, Toolchain
from scripts import build_wheel as module
from scripts.build_wheel import CARDS, find_compilers, main, package_files, write_wheel
from scripts.fat_library import LibraryError

ROOT = Path(__file__).parents[1]
PLATFORM = "manylinux_2_34_x86_64"
ABOUT = f"eri_lora-{eri.__version__}.dist-info"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this repository with a stand-in for the library."""
    folder = tmp_path_factory.mktemp("wheel")
    identity = identity_of(source_hash(), CARDS, cuda="13.0", stable_abi=STABLE_ABI)
    with commit_folder(folder / "kernels", identity=identity) as staging:
        (staging / LIBRARY).write_text("a library")
    return write_wheel(folder / "dist", folder / "kernels", PLATFORM)


def test_its_name_says_any_python_and_these_systems(wheel: Path) -> None:
    name, version, _, tags = parse_wheel_filename(wheel.name)
    assert (name, str(version)) == ("eri-lora", eri.__version__)
    assert {str(tag) for tag in tags} == {f"py3-none-{PLATFORM}"}
    assert [path.name for path in wheel.parent.iterdir()] == [wheel.name]
    form = zipfile.ZipFile(wheel).read(f"{ABOUT}/WHEEL").decode().splitlines()
    assert f"Tag: py3-none-{PLATFORM}" in form and "Root-Is-Purelib: false" in form


def test_it_has_every_file_of_the_package_the_library_and_nothing_else(wheel: Path) -> None:
    command = ["git", "ls-files", "-co", "--exclude-standard", "eri"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    kernels = {f"eri/layers/kernels/{name}" for name in (LIBRARY, "manifest.json")}
    about = {f"{ABOUT}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")}
    expected = {*listed.stdout.splitlines(), *kernels, *about, f"{ABOUT}/licenses/LICENSE"}
    assert set(zipfile.ZipFile(wheel).namelist()) == expected


def test_what_running_leaves_is_left_out(tmp_path: Path) -> None:
    for name in ("a.py", "kernels", "b/__pycache__/c.pyc", "layers/kernels/x.so", ".DS_Store"):
        (tmp_path / "eri" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "eri" / name).touch()
    assert [name for name, _ in package_files(tmp_path)] == ["eri/a.py", "eri/kernels"]


def test_the_record_has_the_hash_of_every_file(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    rows = [line.rsplit(",", 2) for line in archive.read(f"{ABOUT}/RECORD").decode().splitlines()]
    assert [name for name, *_ in rows] == archive.namelist()
    assert rows.pop() == [f"{ABOUT}/RECORD", "", ""]
    for name, digest, size in rows:
        content = archive.read(name)
        found = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        assert (digest, int(size)) == (f"sha256={found}", len(content)), name


def test_an_installer_reads_what_the_project_says(wheel: Path) -> None:
    content = zipfile.ZipFile(wheel).read(f"{ABOUT}/METADATA")
    found = Metadata.from_email(content, validate=True)
    assert (found.name, str(found.version)) == ("eri-lora", eri.__version__)
    assert (found.license_expression, found.license_files) == ("Apache-2.0", ["LICENSE"])
    assert found.requires_python is not None and "3.11" in found.requires_python
    assert found.description == (ROOT / "README.md").read_text(encoding="utf-8")
    needs = found.requires_dist or []
    assert Requirement("torch>=2.10") in needs
    assert any(need.name == "ninja" and "linux" in str(need.marker) for need in needs)
    dev = [need.name for need in needs if need.marker and "extra" in str(need.marker)]
    assert {"pytest", "ruff", "pyright"} <= set(dev) and "torch" not in dev
    commands = zipfile.ZipFile(wheel).read(f"{ABOUT}/entry_points.txt").decode()
    assert commands == "[console_scripts]\neri = eri.__main__:main\n"


def test_a_marker_of_an_extra_is_kept() -> None:
    project = {
        **{"name": "x", "description": "x", "license": "MIT", "requires-python": ">=3.11"},
        **{"license-files": [], "keywords": [], "classifiers": [], "dependencies": []},
        "optional-dependencies": {"dev": ["a>=1; sys_platform == 'linux' or os_name == 'nt'"]},
    }
    found = Metadata.from_email(module.metadata(project, "1", "").encode(), validate=True)
    (need,) = found.requires_dist or []
    assert need.marker is not None
    assert need.marker.evaluate({"sys_platform": "linux", "extra": "dev"})
    assert not need.marker.evaluate({"sys_platform": "linux", "extra": ""})


def test_the_same_sources_are_the_same_bytes(wheel: Path, tmp_path: Path) -> None:
    again = write_wheel(tmp_path, wheel.parents[1] / "kernels", PLATFORM)
    assert again.read_bytes() == wheel.read_bytes()


CHILD = """
import os, sys
sys.executable = sys.argv[1]
import torch
import eri
from eri.layers import build, toolchain
toolchain.CUDA_FOLDERS, toolchain.PACKAGES = (), toolchain.Path("/none")
torch.version.cuda = "13.0"
print(os.path.dirname(eri.__file__))
for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0)):
    print(build.library(capability))
print(build.library((10, 0)))
"""


def libraries(site: Path, tools: Path) -> list[str]:
    """What a process with a PATH of one empty folder finds, for each card of `CHILD`."""
    tools.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tools / "python")],  # ninja beside Python is not found
        cwd=tools,
        env={"PATH": str(tools), "PYTHONPATH": str(site), "ERI_CACHE": str(tools / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    where, *found = done.stdout.splitlines()
    assert where == str(site / "eri")
    return found


def test_installed_where_there_is_no_compiler(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "-q"]
    target = ["--target", str(site), "--platform", PLATFORM, "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "install", *options, *target, str(wheel)]
    subprocess.run(command, check=True, env=os.environ | {"PIP_CONFIG_FILE": os.devnull})
    *found, other = libraries(site, tmp_path / "bin")
    assert found == [str(site / "eri/layers/kernels" / LIBRARY)] * 5
    assert other.startswith("the wheel's kernels are for sm_80, sm_86, ")
    assert "no CUDA compiler (nvcc)" in other and "no ninja" in other


def test_damaged_where_there_is_no_compiler(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    zipfile.ZipFile(wheel).extractall(site)
    (site / "eri/layers/kernels" / LIBRARY).write_text("a LIBRARY")
    for line in libraries(site, tmp_path / "bin"):
        assert line.startswith("the wheel's kernels are damaged: ")
        assert line.count("no ninja") == 1


def test_compilers_must_be_there_for_every_card(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = Toolchain("nvcc", "g++", "ninja")
    asked: list[tuple[int, int]] = []

    def find(capability: tuple[int, int]) -> Toolchain | list[Lack]:
        asked.append(capability)
        return everywhere

    monkeypatch.setattr(module, "find_toolchain", find)
    assert find_compilers(CARDS) == everywhere
    assert asked == [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)]
    monkeypatch.setattr(
        module, "find_toolchain", lambda capability: Toolchain(str(capability), "g++", "ninja")
    )
    with pytest.raises(LibraryError, match="set CUDA_HOME"):
        find_compilers(CARDS)


def test_without_a_compiler_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "find_toolchain", lambda capability: [Lack("no ninja", "get it")])
    assert main(["--out", str(tmp_path / "dist")]) == 1
    assert capsys.readouterr().err == "error: no ninja; get it\n"
    assert not (tmp_path / "dist").exists()

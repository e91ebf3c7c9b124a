import os
from pathlib import Path

import pytest
import torch

from eri.layers import toolchain as module
from eri.layers.toolchain import (
    Lack,
    Toolchain,
    architecture,
    cuda_version,
    find_toolchain,
    version_of,
)
from tests.layers.compilers import put_compiler, put_program


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of one folder with stand-ins for all three programs, and a PyTorch for CUDA 13.0."""
    folder = tmp_path / "bin"
    put_compiler(folder / "nvcc")
    put_program(folder / "g++", "#!/bin/sh\necho g++ 12.2.0\n")
    put_program(folder / "ninja", "#!/bin/sh\necho 1.13.0\n")
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "CUDA_FOLDERS", (str(tmp_path / "cuda"),))
    monkeypatch.setattr(module, "PACKAGES", tmp_path / "packages")
    monkeypatch.setattr(module.sys, "executable", str(tmp_path / "venv/bin/python"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return folder


def lacks(capability: tuple[int, int] = (9, 0)) -> list[Lack]:
    found = find_toolchain(capability)
    assert isinstance(found, list), found
    return found


def test_all_three_are_found(machine: Path) -> None:
    assert find_toolchain((9, 0)) == Toolchain(
        nvcc=str(machine / "nvcc"), cxx=str(machine / "g++"), ninja=str(machine / "ninja")
    )


def test_everything_missing_is_told_at_once(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = lacks()
    assert [lack.what for lack in found] == [
        "no CUDA compiler (nvcc)",
        "no C++ compiler",
        "no ninja",
    ]
    assert found[0].mend == (
        'pip install "cuda-toolkit[nvcc,cccl]==13.0.*", or '
        "install the CUDA toolkit 13.0 and set CUDA_HOME to its folder"
    )
    assert str(found[2]) == "no ninja; pip install ninja"


def test_the_compiler_that_cuda_home_names(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = put_compiler(tmp_path / "cuda-12.8/bin/nvcc", cuda="12.8")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda-12.8"))
    found = find_toolchain((9, 0))
    assert isinstance(found, Toolchain)  # an older CUDA than PyTorch's builds what its driver runs
    assert found.nvcc == other
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert lacks()[0].what == "no CUDA compiler (nvcc)"


@pytest.mark.parametrize("name", ["CUDA_HOME", "PATH"])
def test_what_is_named_from_here_is_found_from_anywhere(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, "." if name == "CUDA_HOME" else "bin")
    assert find_toolchain((9, 0)) == Toolchain(
        nvcc=str(machine / "nvcc"), cxx=str(machine / "g++"), ninja=str(machine / "ninja")
    )


def test_the_usual_folder_needs_no_path(machine: Path, tmp_path: Path) -> None:
    (machine / "nvcc").unlink()
    usual = put_compiler(tmp_path / "cuda/bin/nvcc")
    found = find_toolchain((9, 0))
    assert isinstance(found, Toolchain)
    assert found.nvcc == usual


def test_a_cuda_newer_than_pytorchs_does_not_fit(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert lacks() == [
        Lack(
            f"{machine / 'nvcc'} is of CUDA 13.0, PyTorch of CUDA 12.8",
            "install the CUDA toolkit 12.8 and set CUDA_HOME to its folder",
        )
    ]
    fitting = put_compiler(tmp_path / "cuda/bin/nvcc", cuda="12.9")
    found = find_toolchain((9, 0))
    assert isinstance(found, Toolchain)
    assert found.nvcc == fitting


def test_the_compiler_of_the_package_index_comes_first(machine: Path, tmp_path: Path) -> None:
    packaged = put_compiler(tmp_path / "packages/nvidia/cu13/bin/nvcc")
    found = find_toolchain((9, 0))
    assert isinstance(found, Toolchain)
    assert found.nvcc == packaged


def test_a_card_that_the_compiler_does_not_know(machine: Path) -> None:
    what = f"{machine / 'nvcc'} (CUDA 13.0) does not build for sm_103"
    assert [lack.what for lack in lacks((10, 3))] == [what]


def test_a_compiler_that_cannot_be_asked(machine: Path) -> None:
    put_program(machine / "nvcc", "#!/bin/sh\nexit 1\n")
    assert lacks()[0].what == f"{machine / 'nvcc'} does not say its version"
    put_program(machine / "nvcc", "not a program\n")
    assert cuda_version(str(machine / "nvcc")) is None
    assert version_of(str(machine / "nvcc")) == "?"


def test_ninja_beside_a_python_that_is_not_activated(machine: Path, tmp_path: Path) -> None:
    (machine / "ninja").unlink()
    beside = put_program(tmp_path / "venv/bin/ninja", "#!/bin/sh\necho 1.13.0\n")
    found = find_toolchain((9, 0))
    assert isinstance(found, Toolchain)
    assert found.ninja == beside


def test_the_c_compiler_that_cxx_names(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = put_program(machine / "clang++", "#!/bin/sh\necho clang version 19.1.0\n")
    monkeypatch.setenv("CXX", "clang++")
    found = find_toolchain((9, 0))
    assert isinstance(found, Toolchain)
    assert found.cxx == other
    assert version_of(found.cxx) == "19.1.0"
    monkeypatch.setenv("CXX", "missing++")
    assert lacks()[0].what == "no C++ compiler (CXX is 'missing++')"


def test_names_of_cards() -> None:
    assert architecture((9, 0)) == "90a"
    assert [architecture(card) for card in ((8, 0), (8, 6), (8, 9), (12, 0))] == [
        "80", "86", "89", "120",
    ]  # fmt: skip


def test_the_programs_of_this_machine_answer() -> None:
    found = find_toolchain((9, 0))
    if isinstance(found, list):
        pytest.skip("; ".join(map(str, found)))
    assert cuda_version(found.nvcc)
    assert version_of(found.ninja) != "?"
    assert os.access(found.cxx, os.X_OK)

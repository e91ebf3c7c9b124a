"""The programs that build the CUDA kernels: where they are, and what is missing or does not fit."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Lack", "Toolchain", "architecture", "cuda_version", "find_toolchain", "version_of"]

CUDA_FOLDERS = ("/usr/local/cuda", "/opt/cuda")
SECONDS = 30  # that a program may take to say its version


@dataclass(frozen=True)
class Lack:
    """Something that keeps the kernels from being built, and one thing to do about it."""

    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.what}; {self.mend}"


@dataclass(frozen=True)
class Toolchain:
    """The three programs, by their paths."""

    nvcc: str
    cxx: str
    ninja: str


def architecture(capability: tuple[int, int]) -> str:
    """What nvcc calls a card: 9.0 -> `90a`, which has Hopper's own instructions; 8.6 -> `86`."""
    number = "{}{}".format(*capability)
    return f"{number}a" if number == "90" else number


def cuda_version(nvcc: str) -> str | None:
    """The CUDA version of a compiler, as `13.0`; None where it does not say."""
    found = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
    return None if found is None else found[1]


def version_of(program: str) -> str:
    """The first number of the shape 1.2 that a program says of itself; `?` where it says none."""
    found = re.search(r"\d+\.\d+[.\d]*", _output(program, "--version"))
    return "?" if found is None else found[0]


def find_toolchain(capability: tuple[int, int]) -> Toolchain | list[Lack]:
    """Look for the programs, and whether they can build for a card.

    Args:
        capability: of the card, as `torch.cuda.get_device_capability` has it.

    Returns:
        The programs, or everything that is missing.
    """
    nvcc, cxx, ninja = _find_nvcc(), _find_cxx(), _find_ninja()
    lacks = [*_lacks_of(nvcc, capability)]
    if cxx is None:
        named = f" (CXX is {os.environ['CXX']!r})" if os.environ.get("CXX") else ""
        mend = "install g++ (Debian and Ubuntu: apt install g++)"
        lacks.append(Lack(f"no C++ compiler{named}", mend))
    if ninja is None:
        lacks.append(Lack("no ninja", "pip install ninja"))
    if lacks or nvcc is None or cxx is None or ninja is None:
        return lacks
    return Toolchain(nvcc, cxx, ninja)


def _find_nvcc() -> str | None:
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return shutil.which(os.path.join(named, "bin", "nvcc"))
    places = (os.path.join(folder, "bin", "nvcc") for folder in CUDA_FOLDERS)
    return next(filter(None, map(shutil.which, ("nvcc", *places))), None)


def _find_cxx() -> str | None:
    named = os.environ.get("CXX")
    return shutil.which(named) if named else shutil.which("g++") or shutil.which("c++")


def _find_ninja() -> str | None:
    """On the PATH, or beside this Python: a virtual environment that is not activated has it."""
    return shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))


def _lacks_of(nvcc: str | None, capability: tuple[int, int]) -> list[Lack]:
    wanted = torch.version.cuda or "13.0"
    toolkit = f"install the CUDA toolkit {wanted} and set CUDA_HOME to its folder"
    if nvcc is None:
        return [Lack("no CUDA compiler (nvcc)", toolkit)]
    found = cuda_version(nvcc)
    if found is None:
        return [Lack(f"{nvcc} does not say its version", toolkit)]
    if int(found.partition(".")[0]) > int(wanted.partition(".")[0]):
        # a driver that is new enough for PyTorch may be too old for what this compiler builds
        return [Lack(f"{nvcc} is of CUDA {found}, PyTorch of CUDA {wanted}", toolkit)]
    name = "compute_{}{}".format(*capability)
    if name not in _output(nvcc, "--list-gpu-arch").split():
        card = "sm_{}{}".format(*capability)
        return [Lack(f"{nvcc} (CUDA {found}) does not build for {card}", toolkit)]
    return []


def _output(program: str, *arguments: str) -> str:
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, errors="replace", timeout=SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout

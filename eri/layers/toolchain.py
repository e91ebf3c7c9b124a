"""The programs that build the CUDA kernels: where they are, and what is missing or does not fit.

The kernels take what their card can do, such as clusters of blocks on Hopper. With the environment
variable `ERI_KERNELS=portable` they are compiled as for the oldest card instead, into machine code
of the one that is there: what all others run is then tested and timed on this one, as in
`ERI_KERNELS=portable pytest -m gpu tests/layers`. It is read here alone.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from eri.errors import ConfigError
from eri.printable import printable

__all__ = [
    "Lack",
    "Toolchain",
    "architecture",
    "code_for",
    "cuda_version",
    "find_toolchain",
    "is_portable",
    "version_of",
]

CUDA_FOLDERS = ("/usr/local/cuda", "/opt/cuda")
PACKAGES = Path(torch.__file__).parents[1]  # where those of the package index are installed
VARIABLE, PORTABLE = "ERI_KERNELS", "portable"
OLDEST = "80"  # card with kernels
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


def is_portable() -> bool:
    """Whether `ERI_KERNELS` asks for kernels that take nothing of their card alone.

    Raises:
        ConfigError: it asks for something else.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in {"", PORTABLE}:
        raise ConfigError(
            f"{printable(wanted)!r} are no kernels",
            where=VARIABLE,
            hint=f"set it to {PORTABLE}, or not at all",
        )
    return wanted == PORTABLE


def architecture(capability: tuple[int, int]) -> str:
    """What kernels for a card are compiled for, as `code_for` reads it.

    9.0 -> `90a`, which has Hopper's own instructions, or `90-portable`; 8.6 -> `86`.
    """
    number = "{}{}".format(*capability)
    if is_portable():
        return f"{number}-{PORTABLE}"
    return f"{number}a" if number == "90" else number


def code_for(card: str) -> str:
    """The option of nvcc's that compiles for a card.

    `90a` is machine code; `120+PTX` intermediate code, too, for the cards that come after it;
    `90-portable` machine code of instructions that the oldest card has as well.
    """
    number, _, ptx = card.partition("+")
    number, _, portable = number.partition("-")
    if portable:
        return f"-gencode=arch=compute_{OLDEST},code=sm_{number}"
    code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code={code}"


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

    Of several CUDA compilers the first that fits is taken: the one that CUDA_HOME names, and no
    other; else those of the package index, of the PATH and of the usual folders.

    Args:
        capability: of the card, as `torch.cuda.get_device_capability` has it.

    Returns:
        The programs, or everything that is missing.
    """
    compilers = {nvcc: _misfit(nvcc, capability) for nvcc in _compilers()}
    nvcc = next((nvcc for nvcc, misfit in compilers.items() if misfit is None), None)
    cxx, ninja = _find_cxx(), _find_ninja()
    if nvcc is not None and cxx is not None and ninja is not None:
        return Toolchain(nvcc, cxx, ninja)
    lacks = []
    if nvcc is None:
        misfits = filter(None, compilers.values())
        lacks.append(Lack("; ".join(misfits) or "no CUDA compiler (nvcc)", _toolkit()))
    if cxx is None:
        named = f" (CXX is {os.environ['CXX']!r})" if os.environ.get("CXX") else ""
        mend = "install g++ (Debian and Ubuntu: apt install g++)"
        lacks.append(Lack(f"no C++ compiler{named}", mend))
    if ninja is None:
        lacks.append(Lack("no ninja", "pip install ninja"))
    return lacks


def _compilers() -> list[str]:
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        places = [os.path.join(named, "bin", "nvcc")]
    else:
        packages = sorted(PACKAGES.glob("nvidia/cu*/bin/nvcc"), reverse=True)
        usual = [os.path.join(folder, "bin", "nvcc") for folder in CUDA_FOLDERS]
        places = [*map(str, packages), "nvcc", *usual]
    found = filter(None, map(_find, places))
    return list({os.path.realpath(path): path for path in reversed([*found])}.values())[::-1]


def _misfit(nvcc: str, capability: tuple[int, int]) -> str | None:
    """Why a compiler cannot build kernels for this PyTorch and a card; None where it can."""
    found, wanted = cuda_version(nvcc), _wanted()
    if found is None:
        return f"{nvcc} does not say its version"
    if int(found.partition(".")[0]) > int(wanted.partition(".")[0]):
        # a driver that is new enough for PyTorch may be too old for what this compiler builds
        return f"{nvcc} is of CUDA {found}, PyTorch of CUDA {wanted}"
    name = "compute_{}{}".format(*capability)
    if name not in _output(nvcc, "--list-gpu-arch").split():
        return f"{nvcc} (CUDA {found}) does not build for sm_" + "{}{}".format(*capability)
    return None


def _wanted() -> str:
    return torch.version.cuda or "13.0"


def _toolkit() -> str:
    """How to get a CUDA compiler; from version 13 on the package index has all of it."""
    wanted = _wanted()
    install = f"install the CUDA toolkit {wanted} and set CUDA_HOME to its folder"
    if int(wanted.partition(".")[0]) < 13:
        return install
    return f'pip install "cuda-toolkit[nvcc,cccl]=={wanted}.*", or {install}'


def _find_cxx() -> str | None:
    named = os.environ.get("CXX")
    return _find(named) if named else _find("g++") or _find("c++")


def _find_ninja() -> str | None:
    """On the PATH, or beside this Python: a virtual environment that is not activated has it."""
    return _find("ninja") or _find("ninja", path=str(Path(sys.executable).parent))


def _find(program: str, path: str | None = None) -> str | None:
    """Where a program is, from any folder: ninja runs the compilers in another one."""
    found = shutil.which(program, path=path)
    return None if found is None else os.path.abspath(found)


def _output(program: str, *arguments: str) -> str:
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, errors="replace", timeout=SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout

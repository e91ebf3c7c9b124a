"""Stand-ins for the programs that build the kernels: quick, and as broken as a test wants them."""

import stat
import sys
from pathlib import Path

from eri.layers.toolchain import Toolchain

NVCC = """#!{python}
import os, pathlib, sys
if "--version" in sys.argv:
    print("Cuda compilation tools, release {cuda}, V{cuda}.88")
elif "--list-gpu-arch" in sys.argv:
    print("{cards}")
else:
    with open({log!r}, "a") as log:
        print(*sys.argv[1:], file=log)
    if {broken!r} and {broken!r} in " ".join(sys.argv):
        print(f"{broken}(7): error: identifier \\x07foo is undefined")
        sys.exit(2)
    pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_text(" ".join(sys.argv))
"""
PYTHON = sys.executable  # even where a test gives Python another place
CARDS = "compute_80\ncompute_86\ncompute_90\ncompute_120"


def put_program(path: Path, text: str) -> str:
    """Write a script that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def put_compiler(path: Path, *, cuda: str = "13.0", broken: str = "") -> str:
    """A compiler that writes its command line as its output, or fails for one source."""
    text = NVCC.format(
        python=PYTHON,
        cuda=cuda,
        cards=CARDS.replace("\n", "\\n"),
        log=str(path.parent / "log"),
        broken=broken,
    )
    return put_program(path, text)


def put_toolchain(folder: Path, ninja: str, *, broken: str = "") -> Toolchain:
    """A toolchain that does nothing and logs each call in `folder`/log; its ninja is real."""
    compiler = put_compiler(folder / "nvcc", broken=broken)
    return Toolchain(nvcc=compiler, cxx=compiler, ninja=ninja)


def compiled(folder: Path) -> int:
    """How often a stand-in compiler of a folder compiled or linked."""
    log = folder / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0

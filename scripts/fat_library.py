"""One library with the kernels for several kinds of cards, and what is in it."""

import re
import shutil
import struct
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from eri.layers.build import LOG, compile_library
from eri.layers.toolchain import Toolchain

SHARED_LIMIT = 99 * 1024  # bytes of shared memory that a block has on the least of our cards
FROM_PYTORCH = {"libtorch_cpu.so", "libtorch_cuda.so"}
FROM_THE_SYSTEM = {
    *("libc.so.6", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0"),
    *("libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"),
}
SYSTEMS = (  # glibc; the newest GLIBCXX, CXXABI and GCC versions that systems with it have
    ((2, 17), (3, 4, 19), (1, 3, 7), (4, 8, 0)),
    ((2, 24), (3, 4, 22), (1, 3, 10), (4, 8, 0)),
    ((2, 27), (3, 4, 24), (1, 3, 11), (7, 0, 0)),
    ((2, 31), (3, 4, 28), (1, 3, 12), (7, 0, 0)),
    ((2, 34), (3, 4, 29), (1, 3, 13), (7, 0, 0)),
    ((2, 35), (3, 4, 30), (1, 3, 13), (12, 0, 0)),
    ((2, 39), (3, 4, 33), (1, 3, 15), (14, 0, 0)),
)
"""From the policies of auditwheel, which sum up what distributions ship."""

CONTAINER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes that follow
ENTRY = struct.Struct(
    "<HHIQIIHHI"
)  # kind, _, bytes of this header, bytes of code, _, _, _, _, card
MAGIC = 0xBA55ED50
KINDS = {1: "PTX", 2: "code"}


class LibraryError(Exception):
    """A library that a wheel must not bring, in words."""


@dataclass(frozen=True)
class Kernels:
    """What the compiler said of the kernels for one card."""

    count: int
    shared: int  # bytes of static shared memory, at most
    registers: int  # a thread, at most
    spilled: int  # kernels that spill registers


def compile_for(folder: Path, toolchain: Toolchain, cards: Sequence[str]) -> tuple[Path, str]:
    """Compile every source for all cards, in an existing folder.

    A PyTorch for the CPU has no libtorch_cuda; an empty one is linked then, so that the name is in
    the library and the real one is found where it is loaded.

    Returns:
        The library, and what the compilers said.

    Raises:
        ConfigError: a compiler failed.
    """
    stand_in = folder / "libtorch_cuda.so"
    command = [toolchain.cxx, "-shared", "-fPIC", "-xc++", "/dev/null", "-nostdlib"]
    subprocess.run([*command, f"-Wl,-soname,{stand_in.name}", "-o", stand_in], check=True)
    library = compile_library(folder, toolchain, *cards, options=["--resource-usage"])
    return library, (folder / LOG).read_text()


def kernels_of(said: str) -> dict[str, Kernels]:
    """By card, what nvcc's `--resource-usage` says of its kernels.

    Raises:
        LibraryError: it says nothing.
    """
    found: dict[str, list[tuple[int, int, bool]]] = defaultdict(list)
    card, spills = "", False
    for line in said.splitlines():
        if begins := re.search(r"Compiling entry function '\S+' for 'sm_(\w+)'", line):
            card, spills = begins[1], False
        elif stores := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = stores[1] != "0" or stores[2] != "0"
        elif card and (used := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            found[card].append((int(shared[1]) if shared else 0, int(used[1]), spills))
            card = ""
    if not found:
        raise LibraryError("nvcc did not say what its kernels use")
    return {
        card: Kernels(
            count=len(each),
            shared=max(shared for shared, _, _ in each),
            registers=max(registers for _, registers, _ in each),
            spilled=sum(spills for _, _, spills in each),
        )
        for card, each in found.items()
    }


def code_of(library: bytes) -> dict[str, Counter[str]]:
    """By card, as `90` or `120 PTX`, how many pieces of code a library has, and their bytes."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, number, size in _pieces(library):
        card = f"{number} PTX" if KINDS[kind] == "PTX" else str(number)
        found[card].update(pieces=1, bytes=size)
    return dict(found)


def _pieces(library: bytes) -> Iterator[tuple[int, int, int]]:
    """(kind, card, bytes) of every piece in every container of code for cards."""
    magic = MAGIC.to_bytes(4, "little")
    at = library.find(magic)
    while at >= 0:
        _, version, header, length = CONTAINER.unpack_from(library, at)
        if (version, header) != (1, CONTAINER.size):  # these bytes by chance
            at = library.find(magic, at + 1)
            continue
        entry, end = at + header, at + header + length
        while entry < end:
            kind, _, before, size, *_, number = ENTRY.unpack_from(library, entry)
            yield kind, number, size
            entry += before + size
        at = library.find(magic, end)


def check_kernels(kernels: dict[str, Kernels], library: bytes, cards: Sequence[str]) -> None:
    """Refuse a library that lacks code for a card, or whose kernels are too large for one.

    Raises:
        LibraryError: with every reason.
    """
    code = code_of(library)
    problems = []
    for card in cards:
        name, _, ptx = card.partition("+")
        number = name.rstrip("a")
        pieces = [number, *([f"{number} PTX"] if ptx else [])]
        problems += [f"no code for sm_{piece}" for piece in pieces if piece not in code]
        if name not in kernels:
            problems.append(f"no kernel was compiled for sm_{name}")
        elif (shared := kernels[name].shared) > SHARED_LIMIT:
            problems.append(f"a kernel for sm_{name} uses {shared} bytes of shared memory")
    if len({found["pieces"] for card, found in code.items() if "PTX" not in card}) > 1:
        problems.append("some sources were not compiled for every card")
    if problems:
        raise LibraryError("; ".join(problems))


def platform_tag(library: Path, machine: str) -> str:
    """The oldest systems that have all that a library needs, as `manylinux_2_34_x86_64`.

    Raises:
        LibraryError: it needs a library that neither PyTorch nor every system has, or a newer
            runtime than any system is known to have.
    """
    objdump = shutil.which("objdump")
    if objdump is None:
        raise LibraryError("objdump is missing, which comes with g++ (binutils)")
    command = [objdump, "-p", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, env={"LC_ALL": "C"}, check=True)
    return tag_of(done.stdout, machine)


def tag_of(described: str, machine: str) -> str:
    """`platform_tag` of what objdump says of a library."""
    names = set(re.findall(r"NEEDED +(\S+)", described))
    if strangers := sorted(names - FROM_PYTORCH - FROM_THE_SYSTEM):
        raise LibraryError(f"it needs {', '.join(strangers)}")
    if missing := sorted(FROM_PYTORCH - names):
        raise LibraryError(f"it does not name {', '.join(missing)}")
    if special := sorted(set(re.findall(r"\bGLIBC_[A-Z]\w*", described))):
        raise LibraryError(f"it needs {', '.join(special)}, which no tag tells of")
    kinds = ("GLIBC", "GLIBCXX", "CXXABI", "GCC")
    newest: dict[str, tuple[int, ...]] = dict.fromkeys(kinds, (0,))
    for kind, version in re.findall(r"\b(GLIBC|GLIBCXX|CXXABI|GCC)_(\d+(?:\.\d+)*)\b", described):
        newest[kind] = max(newest[kind], tuple(map(int, version.split("."))))
    for glibc, *has in SYSTEMS:
        needs = [newest[kind] for kind in ("GLIBCXX", "CXXABI", "GCC")]
        if all(need <= have for need, have in zip(needs, has, strict=True)):
            oldest = max(newest["GLIBC"][:2], glibc)
            return f"manylinux_{oldest[0]}_{oldest[1]}_{machine}"
    raise LibraryError(f"its C++ runtime is newer than any that is known here: {newest}")

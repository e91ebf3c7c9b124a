"""Builds the CUDA kernels once for each kind of card, keeps them, and loads them.

All sources of `csrc/` become one library, in `<cache>/kernels/<card>-<hash>/`. The hash is of the
sources, the flags, PyTorch, its CUDA, the card and the system's C library, so that a library found
there is never stale; Python has no part in it, for the sources use PyTorch's stable ABI alone. The
folder is made as checkpoints are: written beside its place, with a manifest of hashes, and renamed.
It belongs to this user, nobody else may write it, and the hash is compared before it is loaded.

A library that was built here is taken before one that a wheel brought (`eri.layers.prebuilt`), for
it was made for this very card and PyTorch; only where there is neither is one built.

Our own build file for ninja, not `torch.utils.cpp_extension.load`: that links Python and PyTorch's
C++ classes, which the stable ABI does without, and loads what it built before it can be verified.
"""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from eri.errors import ConfigError, DiskError, EriError, ModelError, OccupiedError
from eri.files import cache_dir, commit_folder, disk_errors, lock, sweep_staging, verify_folder
from eri.layers.prebuilt import LIBRARY, is_prebuilt, prebuilt_library
from eri.layers.toolchain import Toolchain, architecture, code_for, find_toolchain, is_portable
from eri.printable import printable

__all__ = [
    "STABLE_ABI",
    "built_library",
    "compile_library",
    "library",
    "library_folder",
    "load_kernels",
    "ready_library",
    "source_hash",
]

SOURCES = Path(__file__).parent / "csrc"
LOG = "ninja.log"  # all that the compilers said
STABLE_ABI = "0x020a000000000000"  # of PyTorch 2.10, the oldest that eri runs on
CXX_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={STABLE_ABI}")
CUDA_FLAGS = ("-std=c++20", "-O3", "-Xcompiler", "-fPIC")
CXX_LIBRARY = ("-l:libstdc++.so.6",)  # the one that PyTorch runs on, never a copy inside of ours
LINK_FLAGS = (
    *("-shared", "-cudart", "static"),  # works beside whichever runtime PyTorch brings
    *("-Xlinker", "--no-as-needed"),  # names PyTorch's libraries, whichever functions they have
)
LAST_LINES = 15  # of a compiler that failed
POLL_SECONDS = 0.2
REFERENCE = "train.backend: reference does without our kernels"

Say = Callable[[str], None]
log = logging.getLogger(__name__)
_outcomes: dict[tuple[int, int], str | EriError | None] = {}  # of loading; a failure stays one


def load_kernels(capability: tuple[int, int], say: Say = log.warning) -> str | None:
    """Load the kernels for a card into this process, and build them before that if need be.

    Args:
        capability: of the card.
        say: gets one line when they are built.

    Returns:
        Why there are none, in words: no compiler, or kernels for another card are loaded already.
        None once they are loaded.

    Raises:
        ConfigError: the compiler failed, or the system refuses the library; again at each call.
        DiskError: the cache cannot be written, or is somebody else's.
    """
    if capability not in _outcomes:
        try:
            _outcomes[capability] = _load(capability, say)
        except EriError as error:
            _outcomes[capability] = error
    outcome = _outcomes[capability]
    if isinstance(outcome, EriError):
        raise outcome
    return outcome


def _load(capability: tuple[int, int], say: Say) -> str | None:
    other = next((card for card, outcome in _outcomes.items() if outcome is None), None)
    if other is not None:  # one op has one implementation for all cards of a process
        return "this process has kernels for sm_{}{}, this card is sm_{}{}".format(
            *other, *capability
        )
    path = library(capability, say)
    if isinstance(path, Path) and is_prebuilt(path):
        refused = _refused(path)
        if refused is None:
            return None
        path = _built_or_new(capability, say, f"the wheel's kernels cannot be loaded: {refused}")
    if isinstance(path, str):
        return path
    refused = _refused(path)
    if refused is not None:
        raise ConfigError(
            f"the CUDA kernels cannot be loaded: {refused}",
            where=printable(path),
            hint=f"remove that folder to build them anew; {REFERENCE}",
        )
    return None


def _refused(path: Path) -> str | None:
    """Load a library; what the system has against it, None where that is nothing."""
    try:
        torch.ops.load_library(os.fspath(path))
    except OSError as error:
        return printable(str(error.__cause__ or error))
    return None


def library(capability: tuple[int, int], say: Say = log.warning) -> Path | str:
    """The library of kernels for a card: the one in the cache, the wheel's, or a new one.

    Returns:
        Its path, verified; or, where it is not there and no compiler either, what is missing.

    Raises:
        ConfigError: the compiler failed.
        DiskError: the cache cannot be written, or is somebody else's.
    """
    found = ready_library(capability)
    return found if isinstance(found, Path) else _built_or_new(capability, say, found)


def ready_library(capability: tuple[int, int]) -> Path | str | None:
    """The library for a card that needs no building: the one in the cache, else the wheel's.

    Returns:
        Its path, verified; why the wheel's cannot be used, in words; None where there is none.

    Raises:
        DiskError: the cache cannot be used, or is somebody else's.
    """
    found = built_library(capability)
    if found is not None or is_portable():  # a wheel's are not
        return found
    return prebuilt_library(capability, source_hash())


def _built_or_new(capability: tuple[int, int], say: Say, unfit: str | None) -> Path | str:
    """The library in the cache, or a new one; says why a wheel's is not it, if there is one."""
    found = built_library(capability)
    if found is not None:
        return found
    toolchain = find_toolchain(capability)
    if isinstance(toolchain, list):
        return "; ".join([*filter(None, [unfit]), *map(str, toolchain)])
    if unfit is not None:
        say(unfit)
    final = library_folder(capability)
    with _turn(final.parent, say):
        found = built_library(capability)  # another process may have been faster
        if found is not None:
            return found
        sweep_staging(final.parent)
        if final.exists():  # and is damaged
            say(f"building the CUDA kernels anew: {printable(final)} is damaged")
            shutil.rmtree(final)
        _build(final, toolchain, capability, say)
    found = built_library(capability)
    if found is None:
        raise DiskError(
            "the CUDA kernels that were just built are damaged",
            where=printable(final),
            hint="check the disk, or set ERI_CACHE to a folder on another one",
        )
    return found


def built_library(capability: tuple[int, int]) -> Path | None:
    """The library for a card if it is in the cache, ours alone, and whole.

    Raises:
        DiskError: it, or a folder on the way to it, belongs to another user.
    """
    final = library_folder(capability)
    if not final.is_dir():
        return None
    for path in (final, *final.iterdir()):
        _require_private(path)
    try:
        verify_folder(final)
    except ModelError:
        return None
    return final / LIBRARY


def _kernels_folder() -> Path:
    """The folder of the cache that holds all libraries; made if needed, for this user alone."""
    folder = cache_dir() / "kernels"
    with disk_errors(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
    _require_private(folder)
    return folder


def library_folder(capability: tuple[int, int]) -> Path:
    """Where the library for a card is kept, once it is built; named by all that it depends on."""
    arch = architecture(capability)
    parts = [
        *(str(torch.__version__), str(torch.version.cuda), arch),
        *(platform.machine(), *platform.libc_ver(), source_hash()),
    ]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return _kernels_folder() / f"sm_{arch}-{name}"


def source_hash() -> str:
    """SHA-256, in hex, of the sources and of how they are compiled and linked."""
    parts = [*CXX_FLAGS, *CUDA_FLAGS, *LINK_FLAGS, LIBRARY]
    content = hashlib.sha256("\0".join(parts).encode())
    for path in sorted(SOURCES.iterdir()):
        content.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return content.hexdigest()


def _require_private(path: Path) -> None:
    """Refuse what another user owns; take back what others may write."""
    with disk_errors(path):
        found = path.lstat()
        if found.st_uid != _owner() or stat.S_ISLNK(found.st_mode):
            raise DiskError(
                "the kernels' folder, or a file in it, belongs to another user or is a link",
                where=printable(path),
                hint="remove it, or set ERI_CACHE to a folder of your own",
            )
        if stat.S_IMODE(found.st_mode) & 0o077:
            path.chmod(stat.S_IMODE(found.st_mode) & 0o700)


def _owner() -> int:
    """The user whom this process works for: the cache's owner, which `cache_dir` has checked."""
    return cache_dir().stat().st_uid


@contextmanager
def _turn(folder: Path, say: Say) -> Iterator[None]:
    """Hold the folder; while another process holds it, wait: it is building."""
    with ExitStack() as held:
        _wait_for(folder, held, say)
        yield


def _wait_for(folder: Path, held: ExitStack, say: Say) -> None:
    told = False
    while True:
        try:
            held.enter_context(lock(folder))
            return
        except OccupiedError:
            if not told:
                say("waiting for another process that builds the CUDA kernels")
            told = True
            time.sleep(POLL_SECONDS)


def _build(final: Path, toolchain: Toolchain, capability: tuple[int, int], say: Say) -> None:
    arch = architecture(capability)
    say(f"building the CUDA kernels for sm_{arch}, once; it takes less than a minute")
    identity = {"card": f"sm_{arch}", "torch": str(torch.__version__), "cuda": torch.version.cuda}
    with commit_folder(final, identity=identity) as staging:
        objects = staging / "objects"
        objects.mkdir()
        compile_library(objects, toolchain, arch).replace(staging / LIBRARY)
        shutil.rmtree(objects)


def compile_library(
    folder: Path, toolchain: Toolchain, *cards: str, options: Sequence[str] = ()
) -> Path:
    """Compile and link every source, in parallel, in an existing folder.

    Args:
        folder: gets the objects, the build file, what the compilers said (`LOG`) and the library.
            Libraries of PyTorch's that lie there are linked if PyTorch itself lacks them.
        toolchain: the programs.
        cards: as `eri.layers.toolchain.code_for` reads them.
        options: more of them for nvcc, which change nothing in the library.

    Returns:
        The path of the library.

    Raises:
        ConfigError: a program failed; it has the last lines of what that said.
    """
    (folder / "build.ninja").write_text(_build_file(folder, toolchain, cards, options))
    done = subprocess.run(
        [toolchain.ninja, "-C", os.fspath(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C stops a run between steps, not a compiler
    )
    (folder / LOG).write_text(done.stdout)
    if done.returncode != 0 or not (folder / LIBRARY).is_file():
        lines = [printable(line) for line in done.stdout.splitlines() if line.strip()]
        raise ConfigError(
            f"the CUDA kernels for {', '.join(f'sm_{card}' for card in cards)} could not be built: "
            f"ninja ended with {done.returncode}; its last lines follow",
            where=toolchain.nvcc,
            hint=f"`eri doctor` looks at the compilers; {REFERENCE}",
            problems=lines[-LAST_LINES:],
        )
    return folder / LIBRARY


def _build_file(
    folder: Path, toolchain: Toolchain, cards: Sequence[str], options: Sequence[str]
) -> str:
    """What ninja reads: a line an object, one for the library, and how each of them is made."""
    home = Path(torch.__file__).parent
    present = [  # a PyTorch for the CPU lacks the second
        f"-l{name}"
        for name in ("torch_cpu", "torch_cuda")
        if any((place / f"lib{name}.so").is_file() for place in (home / "lib", folder))
    ]
    include = home / "include"
    renamed = [f"-ffile-prefix-map={place}={place.name}" for place in (include, SOURCES)]
    cxx = [toolchain.cxx, *CXX_FLAGS, *renamed, f"-I{include}"]  # no path of ours in messages
    nvcc = [toolchain.nvcc, "-ccbin", toolchain.cxx, *map(code_for, cards)]
    runtime = Path(toolchain.nvcc).resolve().parents[1] / "lib"  # in packages; else lib64
    found = [f"-L{runtime}"] if (runtime / "libcudart_static.a").is_file() else []
    link = [*nvcc, *LINK_FLAGS, *found]
    lines = [
        f"rule cpp\n  command = {_command(cxx)} -c $in -o $out",
        f"rule cu\n  command = {_command([*nvcc, *CUDA_FLAGS, *options])} -c $in -o $out",
        f"rule library\n  command = {_command(link)} $in -o $out "
        + _command([*CXX_LIBRARY, f"-L{home / 'lib'}", "-L.", *present]),
    ]
    objects = []
    for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.cu")]):
        objects.append(f"{source.name}.o")
        lines.append(f"build {objects[-1]}: {source.suffix[1:]} {_escaped(str(source), ' :')}")
    lines.append(f"build {LIBRARY}: library {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _command(words: list[str]) -> str:
    return _escaped(shlex.join(words))


def _escaped(text: str, also: str = "") -> str:
    """As ninja reads it: `$` before `$` and, in paths, before spaces and colons."""
    return "".join(f"${c}" if c in f"${also}" else c for c in text)

"""The kernels are built once, kept for this user alone, verified, and loaded."""

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eri.errors import ConfigError, DiskError
from eri.files import lock
from eri.layers import build as module
from eri.layers.build import built_library, library, library_folder, load_kernels
from eri.layers.toolchain import Lack, Toolchain, find_toolchain
from tests.layers.compilers import compiled, put_toolchain

HOPPER, ADA = (9, 0), (8, 9)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two sources and a header, at a path that shells and ninja trip over."""
    folder = tmp_path / "a: $b 'c'"
    folder.mkdir()
    for name in ("op.h", "op.cpp", "op.cu"):
        (folder / name).write_text(f"// {name}")
    monkeypatch.setattr(module, "SOURCES", folder)
    return folder


@pytest.fixture
def tools(tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts stand-ins for the compilers in place; gives the folder that has their log."""
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    assert ninja, "ninja is installed with eri"

    def put(*, broken: str = "") -> Path:
        folder = tmp_path / "tools"
        toolchain = put_toolchain(folder, ninja, broken=broken)
        monkeypatch.setattr(module, "find_toolchain", lambda capability: toolchain)
        return folder

    return put


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has loaded nothing, and has taken notice of no failure."""
    monkeypatch.setattr(module, "_outcomes", {})


def test_it_is_built_once_and_found_again(tools: Callable[..., Path]) -> None:
    folder, said = tools(), []
    assert built_library(HOPPER) is None
    path = library(HOPPER, said.append)
    assert path == library(HOPPER, said.append) == built_library(HOPPER)
    assert said == ["building the CUDA kernels for sm_90a, once; it takes less than a minute"]
    assert compiled(folder) == 3  # two objects and the library
    assert library(ADA, said.append) != path
    assert compiled(folder) == 6


def test_what_is_compiled_and_how(tools: Callable[..., Path], sources: Path) -> None:
    folder = tools()
    path = library(HOPPER)
    calls = (folder / "log").read_text()
    assert "-gencode=arch=compute_90a,code=sm_90a" in calls
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in calls
    assert f"-c {sources}/op.cu -o op.cu.o" in calls
    linked = path.read_text()
    assert "op.cpp.o op.cu.o" in linked
    assert "torch_python" not in linked and "c10" not in linked


def test_portable_kernels_are_others(
    tools: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tools()
    own = library(HOPPER)
    monkeypatch.setenv("ERI_KERNELS", "portable")
    assert built_library(HOPPER) is None
    portable = library(HOPPER)
    assert own != portable == built_library(HOPPER)
    assert portable.parent.name.startswith("sm_90-portable-")
    assert "-gencode=arch=compute_80,code=sm_90 " in (folder / "log").read_text()


def test_the_runtime_of_the_package_index_is_found(
    tools: Callable[..., Path], tmp_path: Path
) -> None:
    tools()
    here = tmp_path / "lib"
    path = library(HOPPER)
    assert isinstance(path, Path)
    assert f"-L{here}" not in path.read_text().split()
    here.mkdir()
    (here / "libcudart_static.a").touch()
    path = library(ADA)
    assert isinstance(path, Path)
    assert f"-L{here}" in path.read_text().split()


def test_it_is_this_users_alone(tools: Callable[..., Path]) -> None:
    tools()
    path = library(HOPPER)
    assert isinstance(path, Path)
    modes = [entry.stat().st_mode & 0o777 for entry in (path, path.parent, path.parent.parent)]
    assert modes == [0o600, 0o700, 0o700]
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name, "manifest.json"]


@pytest.mark.parametrize("damaged", ["bytes", "shorter", "gone", "manifest"])
def test_a_damaged_library_is_built_anew(tools: Callable[..., Path], damaged: str) -> None:
    tools()
    path = library(HOPPER)
    assert isinstance(path, Path)
    whole = path.read_bytes()
    if damaged == "gone":
        path.unlink()
    elif damaged == "manifest":
        (path.parent / "manifest.json").write_text("{}")
    else:
        path.write_bytes(whole[:-1] + (b"" if damaged == "shorter" else b"!"))
    assert built_library(HOPPER) is None
    said: list[str] = []
    assert library(HOPPER, said.append) == path
    assert "is damaged" in said[0]
    assert path.read_bytes() == whole


def test_what_others_own_is_refused(
    tools: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tools()
    path = library(HOPPER)
    assert isinstance(path, Path)
    real = module._owner()
    monkeypatch.setattr(module, "_owner", lambda: real + 1)
    with pytest.raises(DiskError, match="belongs to another user") as caught:
        library(HOPPER)
    assert str(path.parent.parent) in str(caught.value)
    assert caught.value.hint == "remove it, or set ERI_CACHE to a folder of your own"


def test_a_link_to_another_library_is_refused(tools: Callable[..., Path], tmp_path: Path) -> None:
    tools()
    path = library(HOPPER)
    assert isinstance(path, Path)
    path.replace(tmp_path / "elsewhere.so")
    path.symlink_to(tmp_path / "elsewhere.so")
    with pytest.raises(DiskError, match="is a link"):
        library(HOPPER)


def test_what_others_may_write_is_taken_back(tools: Callable[..., Path]) -> None:
    tools()
    path = library(HOPPER)
    assert isinstance(path, Path)
    for entry in (path, path.parent, path.parent.parent):
        entry.chmod(0o777)
    assert library(HOPPER) == path
    assert not any(
        entry.stat().st_mode & 0o077 for entry in (path, path.parent, path.parent.parent)
    )


def test_a_new_name_for_whatever_it_depends_on(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {library_folder(HOPPER), library_folder(ADA)}
    (sources / "op.h").write_text("// another header")
    names.add(library_folder(HOPPER))
    (sources / "op.cu").rename(sources / "po.cu")
    names.add(library_folder(HOPPER))
    monkeypatch.setattr(module, "CUDA_FLAGS", ("-O1",))
    names.add(library_folder(HOPPER))
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    names.add(library_folder(HOPPER))
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    names.add(library_folder(HOPPER))
    assert len(names) == 7
    assert library_folder(HOPPER) in names


def test_a_failed_build_has_the_compilers_last_lines_and_the_way_out(
    tools: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tools(broken="op.cu")
    with pytest.raises(ConfigError, match="kernels for sm_90a could not be built") as caught:
        load_kernels(HOPPER)
    error = caught.value
    assert any("op.cu(7): error: identifier" in line for line in error.problems)
    assert not any("\x07" in line for line in error.problems)
    assert error.hint is not None and "train.backend: reference" in error.hint
    assert list(library_folder(HOPPER).parent.glob("*sm_90a*")) == []
    calls = compiled(folder)
    with pytest.raises(ConfigError) as again:  # not tried again in this process
        load_kernels(HOPPER)
    assert again.value is error
    assert compiled(folder) == calls


def test_what_a_crash_left_is_removed(tools: Callable[..., Path]) -> None:
    tools()
    left = library_folder(HOPPER).parent / ".staging-sm_90a-0123"
    left.mkdir()
    (left / "half").touch()
    library(HOPPER)
    assert not left.exists()


def test_another_process_that_builds_is_waited_for(tools: Callable[..., Path]) -> None:
    folder, said = tools(), []
    results: list[object] = []
    first = threading.Thread(target=lambda: results.append(library(HOPPER, said.append)))
    with lock(library_folder(HOPPER).parent):
        first.start()
        for _ in range(200):
            if said:
                break
            time.sleep(0.02)
        assert said == ["waiting for another process that builds the CUDA kernels"]
        assert compiled(folder) == 0
    first.join(30)
    assert results == [built_library(HOPPER)]


def test_of_two_only_one_builds(tools: Callable[..., Path]) -> None:
    folder = tools()
    both = [threading.Thread(target=library, args=(HOPPER,)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(30)
    assert compiled(folder) == 3


def test_without_a_compiler_there_is_a_reason_and_no_error(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacks = [Lack("no CUDA compiler", "install one"), Lack("no ninja", "pip install ninja")]
    monkeypatch.setattr(module, "find_toolchain", lambda capability: lacks)
    reason = "no CUDA compiler; install one; no ninja; pip install ninja"
    assert load_kernels(HOPPER) == reason


def test_a_built_library_needs_no_compiler(
    tools: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tools()
    path = library(HOPPER)
    monkeypatch.setattr(module, "find_toolchain", lambda capability: pytest.fail("looked"))
    assert library(HOPPER) == path


def test_a_library_that_the_system_refuses(tools: Callable[..., Path]) -> None:
    tools()  # whose library is a line of text
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*(ELF|too short)") as caught:
        load_kernels(HOPPER)
    assert caught.value.where == str(library_folder(HOPPER) / module.LIBRARY)


def test_kernels_for_a_second_kind_of_card_are_refused(
    tools: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tools()
    loaded: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    assert load_kernels(HOPPER) is None
    assert load_kernels(HOPPER) is None
    assert load_kernels(ADA) == "this process has kernels for sm_90, this card is sm_89"
    assert loaded == [str(library_folder(HOPPER) / module.LIBRARY)]


def real_toolchain() -> Toolchain:
    found = find_toolchain(HOPPER)
    if isinstance(found, list):
        pytest.skip("; ".join(map(str, found)))
    return found


CHECK = """
import ctypes, sys, torch
for stub in sys.argv[2:]:
    ctypes.CDLL(stub, ctypes.RTLD_GLOBAL)
import eri.layers.adamw
def kernel(): return torch._C._dispatch_has_kernel_for_dispatch_key("eri::adamw_", "CUDA")
assert not kernel()
torch.ops.load_library(sys.argv[1])
assert kernel()
"""
STUB = """
extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
"""


def test_the_real_sources_become_a_library_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolchain = real_toolchain()
    one_op = tmp_path / "csrc"  # all of them: .ci/run
    one_op.mkdir()
    for source in (*module.SOURCES.glob("adamw.c*"), *module.SOURCES.glob("*.h")):
        shutil.copy(source, one_op)
    monkeypatch.setattr(module, "SOURCES", one_op)
    path = library(HOPPER)
    assert isinstance(path, Path)
    for place in (one_op, Path(torch.__file__).parent / "include"):  # no path of ours in messages
        assert str(place).encode() not in path.read_bytes()
    stubs = []
    if torch.version.cuda is None:  # what a PyTorch with CUDA would bring
        (tmp_path / "stub.cpp").write_text(STUB)
        stubs = [str(tmp_path / "libtorch_cuda.so")]
        command = [toolchain.cxx, "-shared", "-fPIC", str(tmp_path / "stub.cpp"), "-o", *stubs]
        subprocess.run(command, check=True)
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(path), *stubs], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    needs = subprocess.run(["ldd", str(path)], capture_output=True, text=True).stdout
    assert "libtorch_cpu" in needs
    assert not [name for name in ("python", "c10", "cudart") if name in needs], needs

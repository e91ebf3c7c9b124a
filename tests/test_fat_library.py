"""What is in a library for several cards is read from what the compilers said and made."""

import shutil
import struct
from pathlib import Path

import pytest

from eri.layers import build
from eri.layers.toolchain import find_toolchain
from scripts import fat_library as module
from scripts.fat_library import (
    Kernels,
    LibraryError,
    check_kernels,
    code_of,
    compile_for,
    kernels_of,
    platform_tag,
    tag_of,
)

SAID = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1av' for 'sm_90a'
ptxas info    : Function properties for _Z1av
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 43008 bytes smem
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90a'
ptxas info    : Function properties for _Z1bv
    8 bytes stack frame, 16 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 0 barriers
ptxas info    : Compiling entry function '_Z1av' for 'sm_80'
ptxas info    : Function properties for _Z1av
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 512 bytes smem, 8 bytes cmem[0]
"""
DESCRIBED = """
  NEEDED               libtorch_cpu.so
  NEEDED               libtorch_cuda.so
  NEEDED               libstdc++.so.6
  NEEDED               libc.so.6
  required from libc.so.6:
    0x09691a75 0x00 05 GLIBC_2.2.5
    0x069691b4 0x00 04 {glibc}
  required from libstdc++.so.6:
    0x0297f869 0x00 03 GLIBCXX_3.4.9
    0x0297f869 0x00 02 {glibcxx}
    0x056bafd3 0x00 06 CXXABI_1.3
"""


def test_what_kernels_use_is_read_from_the_compiler() -> None:
    assert kernels_of(SAID) == {
        "90a": Kernels(count=2, shared=43008, registers=168, spilled=1),
        "80": Kernels(count=1, shared=512, registers=32, spilled=0),
    }
    with pytest.raises(LibraryError, match="did not say"):
        kernels_of("ptxas info    : 0 bytes gmem\n")


def container(*pieces: tuple[int, int, int]) -> bytes:
    """A container of (kind, card, bytes) as nvcc writes one, between other bytes."""
    content = b"".join(
        struct.pack("<HHIQIIHHI", kind, 0x101, 64, size, 0, 0, 0, 1, card) + bytes(32 + size)
        for kind, card, size in pieces
    )
    return b"other" + struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(content)) + content


def test_code_is_counted_by_card() -> None:
    chance = (0xBA55ED50).to_bytes(4, "little") + b"no container at all"
    one, two = container((2, 80, 8), (2, 120, 16), (1, 120, 24)), container((2, 80, 32))
    found = code_of(chance + one + two + chance)
    assert {card: (code["pieces"], code["bytes"]) for card, code in found.items()} == {
        "80": (2, 40),
        "120": (1, 16),
        "120 PTX": (1, 24),
    }


def test_a_library_without_code_for_a_card_is_refused() -> None:
    kernels = kernels_of(SAID)
    whole = container((2, 80, 8), (2, 90, 8))
    check_kernels(kernels, whole, ["80", "90a"])
    with pytest.raises(LibraryError, match="no code for sm_86; no kernel was compiled for sm_86"):
        check_kernels(kernels, whole, ["80", "86", "90a"])
    with pytest.raises(LibraryError, match="no code for sm_80 PTX"):
        check_kernels(kernels, whole, ["80+PTX", "90a"])
    with pytest.raises(LibraryError, match="not compiled for every card"):
        check_kernels(kernels, whole + container((2, 80, 8)), ["80", "90a"])


def test_a_kernel_that_is_too_large_for_the_least_card_is_refused() -> None:
    whole = container((2, 90, 8), (2, 80, 8))
    check_kernels(kernels_of(SAID.replace("43008", "101376")), whole, ["80", "90a"])
    with pytest.raises(LibraryError, match="sm_90a uses 101377 bytes of shared memory"):
        check_kernels(kernels_of(SAID.replace("43008", "101377")), whole, ["80", "90a"])


@pytest.mark.parametrize(
    ("glibc", "glibcxx", "tag"),
    [
        ("GLIBC_2.14", "GLIBCXX_3.4.11", "manylinux_2_17_x86_64"),
        ("GLIBC_2.28", "GLIBCXX_3.4.22", "manylinux_2_28_x86_64"),
        ("GLIBC_2.34", "GLIBCXX_3.4.21", "manylinux_2_34_x86_64"),
        ("GLIBC_2.14", "GLIBCXX_3.4.30", "manylinux_2_35_x86_64"),
        ("GLIBC_2.41", "GLIBCXX_3.4.33", "manylinux_2_41_x86_64"),
    ],
)
def test_the_tag_is_of_the_oldest_system_with_both_runtimes(
    glibc: str, glibcxx: str, tag: str
) -> None:
    assert tag_of(DESCRIBED.format(glibc=glibc, glibcxx=glibcxx), "x86_64") == tag


def test_what_no_tag_promises_is_refused() -> None:
    described = DESCRIBED.format(glibc="GLIBC_2.17", glibcxx="GLIBCXX_3.4.9")
    with pytest.raises(LibraryError, match=r"it needs libpython3\.11\.so"):
        tag_of(described + "  NEEDED               libpython3.11.so.1.0\n", "x86_64")
    with pytest.raises(LibraryError, match=r"does not name libtorch_cuda\.so"):
        tag_of(described.replace("libtorch_cuda.so", "libtorch_cpu.so"), "x86_64")
    with pytest.raises(LibraryError, match="it needs GLIBC_ABI_DT_RELR"):
        tag_of(described + "    0x0 0x00 07 GLIBC_ABI_DT_RELR\n", "x86_64")
    with pytest.raises(LibraryError, match="newer than any"):
        tag_of(described.replace("3.4.9", "3.4.99"), "x86_64")


KERNEL = """
__global__ void k(int* x) {
  __shared__ int s[256];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = s[255 - threadIdx.x];
}
"""


def test_a_real_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolchain = find_toolchain((8, 0))
    if isinstance(toolchain, list) or shutil.which("objdump") is None:
        pytest.skip("no CUDA compiler, or no objdump")
    sources, work = tmp_path / "csrc", tmp_path / "work"
    sources.mkdir()
    work.mkdir()
    (sources / "k.cu").write_text(KERNEL)
    monkeypatch.setattr(build, "SOURCES", sources)
    library, said = compile_for(work, toolchain, ["80+PTX"])
    kernels, content = kernels_of(said), library.read_bytes()
    assert (kernels["80"].count, kernels["80"].shared) == (1, 1024)
    assert {"80", "80 PTX"} == set(code_of(content))
    check_kernels(kernels, content, ["80+PTX"])
    assert platform_tag(library, "x86_64").startswith("manylinux_2_")
    monkeypatch.setattr(module, "SHARED_LIMIT", 1023)
    with pytest.raises(LibraryError, match="uses 1024 bytes"):
        check_kernels(kernels, content, ["80+PTX"])

"""The library that a wheel brings: verified and fit for card and PyTorch, or told of, not used."""

import platform
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from eri.errors import ConfigError
from eri.files import commit_folder
from eri.layers import build, prebuilt
from eri.layers.build import STABLE_ABI, library, load_kernels, ready_library, source_hash
from eri.layers.prebuilt import LIBRARY, identity_of, is_prebuilt, prebuilt_library, serves
from eri.layers.toolchain import Lack
from tests.layers.compilers import compiled, put_toolchain

HOPPER, ADA, BLACKWELL = (9, 0), (8, 9), (10, 0)
CARDS = ["80", "86", "89", "90a", "120+PTX"]
LACKS = [Lack("no CUDA compiler", "install one")]


class Wheel:
    """What a wheel brought: a library that is a line of text, with its manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.put()

    def put(self, **others: Any) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        known = identity_of(source_hash(), CARDS, cuda="13.0", stable_abi=STABLE_ABI)
        with commit_folder(self.folder, identity=known | others) as staging:
            (staging / LIBRARY).write_text("a library")


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """An installed wheel on a machine without compilers, whose PyTorch is for CUDA 13.0."""
    monkeypatch.setattr(prebuilt, "FOLDER", tmp_path / "kernels")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(build, "find_toolchain", lambda capability: LACKS)
    monkeypatch.setattr(build, "_outcomes", {})
    return Wheel(prebuilt.FOLDER)


@pytest.fixture
def tools(tmp_path: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sources, and stand-ins for the compilers; the folder that has their log."""
    ninja = shutil.which("ninja")
    if ninja is None:
        pytest.skip("no ninja on the PATH")
    (tmp_path / "csrc").mkdir()
    for name in ("op.cpp", "op.cu"):
        (tmp_path / "csrc" / name).touch()
    monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
    wheel.put()
    toolchain = put_toolchain(tmp_path / "tools", ninja)
    monkeypatch.setattr(build, "find_toolchain", lambda capability: toolchain)
    return tmp_path / "tools"


def unfit(capability: tuple[int, int] = HOPPER) -> str:
    """Why the library that was brought is not used; nothing builds another here."""
    found = ready_library(capability)
    assert isinstance(found, str)
    assert library(capability) == f"{found}; no CUDA compiler; install one"
    return found


def test_a_clone_has_none() -> None:
    assert not prebuilt.FOLDER.exists()
    assert prebuilt_library(HOPPER, source_hash()) is None


def test_it_is_used_without_a_compiler(wheel: Wheel) -> None:
    found = library(HOPPER)
    assert found == wheel.folder / LIBRARY == ready_library(ADA)
    assert is_prebuilt(found)


def test_it_is_not_portable(wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERI_KERNELS", "portable")
    assert ready_library(HOPPER) is None
    assert library(HOPPER) == "no CUDA compiler; install one"


def test_what_was_built_here_comes_first(
    wheel: Wheel, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr(prebuilt, "FOLDER", wheel.folder.with_name("none"))
        built = library(HOPPER)
    assert isinstance(built, Path) and not is_prebuilt(built)
    calls = compiled(tools)
    assert library(HOPPER) == built
    assert library(ADA) == wheel.folder / LIBRARY
    assert compiled(tools) == calls


@pytest.mark.parametrize("damage", ["bytes", "gone", "manifest", "edited", "empty"])
def test_damage_is_told_and_kernels_are_built(
    wheel: Wheel, tools: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    manifest = wheel.folder / "manifest.json"
    if damage == "bytes":
        (wheel.folder / LIBRARY).write_text("a LIBRARY")
    elif damage == "gone":
        (wheel.folder / LIBRARY).unlink()
    elif damage == "manifest":
        manifest.write_text("{}")
    elif damage == "edited":
        manifest.write_text(manifest.read_text().replace('"90a"', '"100"'))
    else:
        shutil.rmtree(wheel.folder)
        with commit_folder(wheel.folder, identity={}):
            pass
    said: list[str] = []
    found = library(HOPPER, said.append)
    assert isinstance(found, Path) and not is_prebuilt(found)
    assert said[0].startswith("the wheel's kernels are damaged: ")
    assert said[1].startswith("building the CUDA kernels for sm_90a, once")
    assert len(said) == 2
    assert compiled(tools) > 0
    monkeypatch.setattr(build, "find_toolchain", lambda capability: LACKS)
    shutil.rmtree(found.parent)
    assert unfit().startswith("the wheel's kernels are damaged: ")


def test_a_card_that_it_has_no_code_for(wheel: Wheel) -> None:
    assert unfit(BLACKWELL) == (
        "the wheel's kernels are for sm_80, sm_86, sm_89, sm_90a, sm_120+PTX, this card is sm_100"
    )


@pytest.mark.parametrize(
    ("card", "runs_on", "not_on"),
    [
        ("80", [(8, 0), (8, 6), (8, 7)], [(7, 5), (9, 0), (12, 0)]),
        ("89", [(8, 9)], [(8, 6), (9, 0)]),
        ("90a", [(9, 0)], [(8, 9), (9, 1), (10, 0)]),
        ("120", [(12, 0), (12, 1)], [(10, 0), (13, 0)]),
        ("120+PTX", [(12, 0), (12, 1), (13, 0)], [(10, 0), (9, 0)]),
    ],
)
def test_which_cards_code_runs_on(
    card: str, runs_on: list[tuple[int, int]], not_on: list[tuple[int, int]]
) -> None:
    assert all(serves(card, capability) for capability in runs_on)
    assert not any(serves(card, capability) for capability in not_on)


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0+cu130", "2.13.0", "3.0.0a0"])
def test_pytorch_from_its_level_of_the_stable_abi_on(
    wheel: Wheel, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert library(HOPPER) == wheel.folder / LIBRARY


def test_a_pytorch_that_is_too_old(wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu130")
    expected = "the wheel's kernels are for PyTorch 2.10 and later, this is 2.9.1+cu130"
    assert unfit() == expected
    wheel.put(stable_abi="0x020e000000000000")
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    assert unfit() == "the wheel's kernels are for PyTorch 2.14 and later, this is 2.13.0"


def test_a_cuda_that_a_driver_may_be_too_old_for(
    wheel: Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cuda in ("13.0", "13.2", "14.0"):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert library(HOPPER) == wheel.folder / LIBRARY
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert unfit() == "the wheel's kernels are of CUDA 13.0, PyTorch of CUDA 12.8"


def test_other_sources_or_another_machine(wheel: Wheel) -> None:
    wheel.put(sources="0" * 64)
    assert unfit() == "the wheel's kernels are of other sources than those beside them"
    wheel.put(machine="riscv64")
    assert unfit() == f"the wheel's kernels are for riscv64, this is {platform.machine()}"


def test_what_the_system_refuses_is_told_and_built(
    wheel: Wheel, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    tried: list[str] = []

    def load(path: str) -> None:
        tried.append(path)
        if is_prebuilt(Path(path)):
            raise OSError("GLIBC_2.99 not found")

    monkeypatch.setattr(torch.ops, "load_library", load)
    assert load_kernels(HOPPER, said.append) is None
    assert said[0] == "the wheel's kernels cannot be loaded: GLIBC_2.99 not found"
    assert said[1].startswith("building the CUDA kernels for sm_90a")
    assert len(tried) == 2 and compiled(tools) > 0


def test_what_the_system_refuses_is_a_reason_without_a_compiler(wheel: Wheel) -> None:
    reason = load_kernels(HOPPER)  # for real: it is a line of text
    assert reason is not None and reason.startswith("the wheel's kernels cannot be loaded: ")
    assert reason.endswith("; no CUDA compiler; install one")


def test_one_that_was_built_and_is_refused_stays_an_error(wheel: Wheel, tools: Path) -> None:
    shutil.rmtree(wheel.folder)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_kernels(HOPPER)

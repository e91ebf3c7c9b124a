from pathlib import Path

import pytest
import torch

from eri.errors import ConfigError
from eri.layers import prebuilt
from eri.layers.toolchain import Lack, Toolchain
from eri.run import doctor as module
from eri.run.doctor import doctor


def test_it_describes_the_machine() -> None:
    facts, _ = doctor()
    text = "\n".join(facts)
    assert "torch 2." in text
    assert "GPU: " in text
    assert "cache: " in text
    assert "kernels: " in text


def test_problems_come_with_their_mend(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(module, "unusable_card", lambda: ("a card is hidden", "unhide it"))
    blocked = tmp_path_factory.mktemp("blocked") / "file"
    blocked.touch()
    monkeypatch.setenv("ERI_CACHE", str(blocked))
    _, problems = doctor()
    assert problems[0] == "a card is hidden\n  mend: unhide it"
    assert problems[1].startswith("cache: ")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a Hopper card and every compiler, on which nothing is built yet."""
    monkeypatch.setattr(module, "choose_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(module, "_card", lambda device: "GPU: a Hopper card")
    monkeypatch.setattr(module, "unsupported_device", lambda device: None)
    monkeypatch.setattr(module, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(
        module, "find_toolchain", lambda capability: Toolchain("/cuda/nvcc", "g++", "ninja")
    )
    monkeypatch.setattr(module, "cuda_version", lambda program: "13.0")
    monkeypatch.setattr(module, "version_of", lambda program: "1.2.3")


def kernels() -> tuple[list[str], list[str]]:
    """What it says of kernels and compilers."""
    facts, problems = doctor()
    about = ("kernels: ", "compilers: ")
    return [f for f in facts if f.startswith(about)], [p for p in problems if p.startswith(about)]


@pytest.mark.usefixtures("hopper")
def test_kernels_that_the_first_run_builds() -> None:
    facts, problems = kernels()
    assert facts[0] == "compilers: nvcc of CUDA 13.0 (/cuda/nvcc), g++ 1.2.3, ninja 1.2.3"
    assert facts[1].startswith("kernels: our own for sm_90a, built by the first run into /")
    assert problems == []


@pytest.mark.usefixtures("hopper")
def test_kernels_that_are_built_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ready_library", lambda capability: Path("/cache/sm_90a/library"))
    tried: list[object] = []
    monkeypatch.setattr(module, "load_kernels", tried.append)
    facts, problems = kernels()
    assert facts[1] == "kernels: our own for sm_90a, built here, in /cache/sm_90a"
    assert problems == []
    assert tried == [(9, 0)]

    def broken(capability: object) -> None:
        raise ConfigError("cannot be loaded", hint="remove the folder")

    monkeypatch.setattr(module, "load_kernels", broken)
    _, problems = kernels()
    assert problems == ["kernels: cannot be loaded\n  mend: remove the folder"]


@pytest.mark.usefixtures("hopper")
def test_missing_compilers_come_with_their_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = [Lack("no CUDA compiler", "install one"), Lack("no ninja", "pip install ninja")]
    monkeypatch.setattr(module, "find_toolchain", lambda capability: lacks)
    facts, problems = kernels()
    assert facts == ["kernels: PyTorch's own; ours for sm_90a cannot be built here"]
    assert problems == [
        "kernels: no CUDA compiler\n  mend: install one",
        "kernels: no ninja\n  mend: pip install ninja",
    ]


@pytest.mark.usefixtures("hopper")
def test_a_built_library_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_toolchain", lambda capability: [Lack("no ninja", "get it")])
    wheel = prebuilt.FOLDER / prebuilt.LIBRARY
    for library, origin in ((Path("/cache/a/b"), "built here"), (wheel, "brought by the wheel")):
        monkeypatch.setattr(module, "ready_library", lambda capability, found=library: found)
        monkeypatch.setattr(module, "load_kernels", lambda capability: None)
        facts, problems = kernels()
        assert facts == [f"kernels: our own for sm_90a, {origin}, in {library.parent}"]
        assert problems == []


@pytest.mark.usefixtures("hopper")
def test_a_wheels_kernels_that_do_not_fit_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ready_library", lambda capability: "the wheel's are for others")
    facts, problems = kernels()
    assert facts[1] == "kernels: the wheel's are for others"
    assert facts[2].startswith("kernels: our own for sm_90a, built by the first run into /")
    assert problems == []


@pytest.mark.usefixtures("hopper")
def test_of_what_the_system_refuses_the_one_that_was_built_then_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ready = [prebuilt.FOLDER / prebuilt.LIBRARY, Path("/cache/sm_90a/library")]
    monkeypatch.setattr(module, "ready_library", lambda capability: ready.pop(0))
    monkeypatch.setattr(module, "load_kernels", lambda capability: None)
    facts, _ = kernels()
    assert facts[1] == "kernels: our own for sm_90a, built here, in /cache/sm_90a"
    monkeypatch.setattr(module, "ready_library", lambda capability: prebuilt.FOLDER / "library")
    monkeypatch.setattr(module, "load_kernels", lambda capability: "it is refused; get ninja")
    facts, problems = kernels()
    assert facts[1] == "kernels: PyTorch's own; it is refused; get ninja"
    assert problems == []

import logging
from collections.abc import Iterator

import pytest
import torch

from eri.errors import ConfigError
from eri.layers import backend as module
from eri.layers.backend import (
    current_backend,
    is_transformed,
    kernels_ready,
    set_backend,
    use_kernel,
)

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


class Machine:
    """A machine with a card; what stands against its kernels, and how often they were asked for."""

    capability = (9, 0)
    missing: str | None = None

    def __init__(self) -> None:
        self.loads = 0

    def load(self, capability: tuple[int, int], say: object) -> str | None:
        assert capability == self.capability
        self.loads += 1
        return self.missing


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    found = Machine()
    monkeypatch.setattr(module, "load_kernels", found.load)
    monkeypatch.setattr(module, "capability_of", lambda device: found.capability)
    monkeypatch.setattr(torch.version, "hip", None)
    yield found
    set_backend("auto")


def supported() -> None:
    """No reason against the kernel."""


def test_auto_takes_the_kernel_where_there_is_one(machine: Machine) -> None:
    said: list[str] = []
    set_backend("auto", said.append)
    assert use_kernel("op", CARD, supported)
    assert not use_kernel("op", CPU, supported)
    assert said == []
    assert machine.loads == 1
    assert use_kernel("op", CARD, supported)
    assert machine.loads == 1  # not looked for at every call


def test_auto_says_each_reason_once(machine: Machine) -> None:
    said: list[str] = []
    set_backend("auto", said.append)
    for width in (7, 7, 9, 7):
        assert not use_kernel("op", CARD, lambda w=width: f"a width of {w}")
    assert said == [
        "op: PyTorch's own operations, not our kernels: a width of 7",
        "op: PyTorch's own operations, not our kernels: a width of 9",
    ]


def test_auto_without_a_compiler_says_so_once_for_all_ops(machine: Machine) -> None:
    said: list[str] = []
    machine.missing = "no CUDA compiler (nvcc)"
    set_backend("auto", said.append)
    assert not use_kernel("one", CARD, supported)
    assert not use_kernel("two", CARD, supported)
    assert said == ["PyTorch's own operations, not our kernels: no CUDA compiler (nvcc)"]


def test_without_a_listener_the_log_has_it(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    set_backend("auto")
    with caplog.at_level(logging.WARNING):
        assert not use_kernel("op", CARD, lambda: "a reason")
    assert caplog.messages == ["op: PyTorch's own operations, not our kernels: a reason"]


def test_cuda_takes_the_kernel_or_raises(machine: Machine) -> None:
    set_backend("cuda")
    assert current_backend() == "cuda"
    assert use_kernel("op", CARD, supported)
    with pytest.raises(ConfigError, match=r"op: a width of 7 \(train.backend\)"):
        use_kernel("op", CARD, lambda: "a width of 7")
    with pytest.raises(ConfigError, match="this is cpu"):
        use_kernel("op", CPU, supported)
    machine.missing = "no CUDA compiler (nvcc)"
    set_backend("cuda")
    with pytest.raises(ConfigError, match=r"^no CUDA compiler"):
        kernels_ready(CARD)


def test_reference_never_looks(machine: Machine) -> None:
    set_backend("reference")
    assert not use_kernel("op", CARD, lambda: pytest.fail("asked"))
    assert not kernels_ready(CARD)
    assert machine.loads == 0


def test_cards_that_have_no_kernels(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    set_backend("cuda")
    machine.capability = (7, 5)
    with pytest.raises(ConfigError, match="for cards from sm_80, this is sm_75"):
        kernels_ready(CARD)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ConfigError, match="this PyTorch is for AMD's"):
        kernels_ready(CARD)
    monkeypatch.setattr(module.sys, "platform", "win32")
    with pytest.raises(ConfigError, match="built on Linux and WSL2, this is win32"):
        kernels_ready(CARD)
    assert machine.loads == 0


def test_a_failed_build_is_an_error_under_auto_too(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(capability: object, say: object) -> None:
        raise ConfigError("could not be built")

    monkeypatch.setattr(module, "load_kernels", broken)
    set_backend("auto")
    with pytest.raises(ConfigError, match="could not be built"):
        use_kernel("op", CARD, supported)


def test_there_are_three_backends() -> None:
    with pytest.raises(ValueError, match="'fast': expected auto, cuda or reference"):
        set_backend("fast")


def test_transformed_is_what_the_compiler_or_a_transform_runs() -> None:
    seen: list[bool] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        seen.append(is_transformed())
        return x.sum()

    note(torch.ones(3))
    torch.func.vmap(note)(torch.ones(2, 3))
    torch.func.grad(note)(torch.ones(3))
    torch.compiler.reset()
    compiled = torch.compile(lambda x: x + is_transformed(), fullgraph=True, backend="eager")
    assert seen == [False, True, True] and compiled(torch.zeros(1)).item() == 1

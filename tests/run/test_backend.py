import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from eri.errors import ConfigError
from eri.layers import backend as dispatch
from eri.layers import prebuilt
from eri.layers.backend import current_backend, set_backend
from eri.layers.toolchain import Lack, Toolchain
from eri.run import backend as module
from eri.run.backend import check_backend, start_backend

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
LACKS = [Lack("no CUDA compiler", "install one"), Lack("no ninja", "pip install ninja")]


class Machine:
    """A machine with a Hopper card, its compilers and no library yet."""

    def __init__(self) -> None:
        self.capability = (9, 0)
        self.toolchain: Toolchain | list[Lack] = Toolchain("nvcc", "g++", "ninja")
        self.ready: Path | str | None = None
        self.loads = 0

    def load(self, capability: tuple[int, int], say: object) -> str | None:
        self.loads += 1
        return "; ".join(map(str, LACKS)) if self.toolchain == LACKS else None


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    found = Machine()
    for place in (module, dispatch):
        monkeypatch.setattr(place, "capability_of", lambda device: found.capability)
    monkeypatch.setattr(module, "find_toolchain", lambda capability: found.toolchain)
    monkeypatch.setattr(module, "ready_library", lambda capability: found.ready)
    monkeypatch.setattr(dispatch, "load_kernels", found.load)
    yield found
    set_backend("auto")


def test_the_plan_says_what_there_is(machine: Machine, tmp_path: Path) -> None:
    for backend in ("auto", "cuda"):
        assert check_backend(backend, CARD) == "kernels  our own for sm_90a, to be built first"
    assert check_backend("reference", CARD) == "kernels  PyTorch's own"
    machine.ready, machine.toolchain = tmp_path, LACKS  # built, and the compiler is gone
    assert check_backend("cuda", CARD) == "kernels  our own for sm_90a"
    machine.ready = prebuilt.FOLDER / prebuilt.LIBRARY
    assert check_backend("cuda", CARD) == "kernels  our own for sm_90a, from the wheel"
    assert machine.loads == 0


def test_a_wheels_kernels_that_do_not_fit_are_a_reason_where_none_can_be_built(
    machine: Machine,
) -> None:
    machine.ready = "the wheel's are for others"
    assert check_backend("auto", CARD) == "kernels  our own for sm_90a, to be built first"
    machine.toolchain = LACKS
    assert check_backend("auto", CARD).startswith("kernels  PyTorch's own: the wheel's are for o")
    with pytest.raises(ConfigError) as caught:
        check_backend("cuda", CARD)
    assert caught.value.problems == ("the wheel's are for others", *map(str, LACKS))


def test_auto_tells_why_there_are_none(machine: Machine) -> None:
    assert check_backend("auto", CPU).endswith("our kernels are for NVIDIA cards, this is cpu")
    machine.toolchain = LACKS
    assert check_backend("auto", CARD) == (
        "kernels  PyTorch's own: no CUDA compiler; install one; no ninja; pip install ninja"
    )


def test_cuda_is_refused_with_everything_that_is_missing(machine: Machine) -> None:
    with pytest.raises(ConfigError) as caught:
        check_backend("cuda", CPU)
    assert caught.value.where == "train.backend"
    assert caught.value.problems == ("our kernels are for NVIDIA cards, this is cpu",)
    assert caught.value.hint == "auto and reference take PyTorch's own operations"
    machine.toolchain = LACKS
    with pytest.raises(ConfigError) as caught:
        check_backend("cuda", CARD)
    assert caught.value.problems == tuple(map(str, LACKS))
    machine.capability = (7, 5)
    with pytest.raises(ConfigError) as caught:
        check_backend("cuda", CARD)
    assert caught.value.problems == ("our kernels are for cards from sm_80, this is sm_75",)


def test_a_run_settles_it_before_it_begins(machine: Machine) -> None:
    said: list[str] = []
    start_backend("auto", CPU, said.append)
    assert (current_backend(), machine.loads) == ("auto", 0)
    start_backend("reference", CARD, said.append)
    assert (current_backend(), machine.loads) == ("reference", 0)
    start_backend("cuda", CARD, said.append)
    assert (current_backend(), machine.loads) == ("cuda", 1)
    assert said == []
    machine.toolchain = LACKS
    start_backend("auto", CARD, said.append)
    assert len(said) == 1 and "no CUDA compiler; install one" in said[0]
    with pytest.raises(ConfigError, match="no CUDA compiler"):
        start_backend("cuda", CARD, said.append)


@pytest.mark.gpu
def test_on_this_card(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert check_backend("cuda", CARD).startswith("kernels  our own for sm_")
        start_backend("cuda", CARD, print)
    assert caplog.messages == []

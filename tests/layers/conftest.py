"""Layer tests draw the same numbers, alone or among others, with a new process's backend."""

from collections.abc import Iterator

import pytest
import torch

from eri.layers.backend import set_backend


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The global generator starts every test in one state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def backend() -> Iterator[None]:
    """Each test begins and ends with the backend that a process begins with."""
    set_backend("auto")
    yield
    set_backend("auto")

"""Layer tests draw the same numbers, alone or among others."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The global generator starts every test in one state."""
    torch.manual_seed(0)

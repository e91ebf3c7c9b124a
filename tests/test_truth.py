"""Training here is training as the field means it: step by step the same as diffusers with PEFT."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.truth import Deltas, Settings, difference, train_here, train_there

SETTINGS = Settings()
STEPS, FEW = 50, 10  # a wrong setting shows after a few


@pytest.fixture(scope="module")
def here(sd15: Path) -> dict[int, Deltas]:
    return train_here(sd15, SETTINGS, {FEW, STEPS})


def test_fifty_steps_give_the_updates_of_diffusers_and_peft(
    sd15: Path, here: dict[int, Deltas]
) -> None:
    assert len(here[STEPS]) == 192
    assert all(delta.any() for delta in here[STEPS].values())
    assert difference(here[STEPS], train_there(sd15, SETTINGS, STEPS)) < 1e-5


@pytest.mark.parametrize(
    "change",
    [{"weight_decay": 0.0}, {"max_grad_norm": None}, {"later": 1}],
    ids=["without weight decay", "without clipping", "a timestep off by one"],
)
def test_the_comparison_notices(
    sd15: Path, here: dict[int, Deltas], change: dict[str, Any]
) -> None:
    wrong = replace(SETTINGS, **change)
    assert difference(here[FEW], train_there(sd15, wrong, FEW)) > 1e-4

"""SD2.x and SDXL, v and zero terminal SNR: trained as diffusers with PEFT trains them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.families import save_sd21, save_sdxl
from tests.truth import (
    BATCH,
    TIMESTEPS,
    Deltas,
    Settings,
    difference,
    timesteps,
    train_here,
    train_there,
)

STEPS, FEW = 20, 5  # SD1.5 takes fifty; a wrong setting shows after a few
V = Settings(prediction="v_prediction")
SAVE = {"sd21": save_sd21, "sdxl": save_sdxl}
CASES = {
    "sd21 v": ("sd21", V),
    "sdxl": ("sdxl", Settings()),
    # with this seed a sample of the 13th step is pure noise
    "sdxl v zero SNR": ("sdxl", replace(V, zero_terminal_snr=True, seed=211)),
}
CONTROLS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "sd21 v": [("epsilon", {"prediction": "epsilon"})],
    "sdxl": [
        ("width before height", {"size_ids": (1, 0, 3, 2, 5, 4)}),
        ("target before crop", {"size_ids": (0, 1, 4, 5, 2, 3)}),
        ("no pooled text", {"pooled": 0.0}),
    ],
    "sdxl v zero SNR": [
        ("epsilon", {"prediction": "epsilon"}),
        ("betas as they were", {"zero_terminal_snr": False}),
    ],
}


@dataclass(frozen=True)
class Trained:
    """What eri learned from a base model, after some numbers of steps."""

    base: Path
    settings: Settings
    here: dict[int, Deltas]


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    family, settings = CASES[request.param]
    base = SAVE[family](tmp_path_factory.mktemp("base") / family)
    return Trained(base, settings, train_here(base, settings, {FEW, STEPS}))


@pytest.mark.parametrize("trained", CASES, indirect=True, scope="module")
def test_twenty_steps_give_the_updates_of_diffusers_and_peft(trained: Trained) -> None:
    mine = trained.here[STEPS]
    assert len(mine) == 192
    assert all(delta.any() for delta in mine.values())
    assert difference(mine, train_there(trained.base, trained.settings, STEPS)) < 1e-5


@pytest.mark.parametrize(
    ("trained", "change"),
    [
        pytest.param(case, change, id=f"{case}: {name}")
        for case, changes in CONTROLS.items()
        for name, change in changes
    ],
    indirect=["trained"],
    scope="module",
)
def test_the_comparison_notices(trained: Trained, change: dict[str, Any]) -> None:
    wrong = replace(trained.settings, **change)
    assert difference(trained.here[FEW], train_there(trained.base, wrong, FEW)) > 1e-2


def test_zero_snr_is_trained_where_nothing_is_left_of_the_image() -> None:
    seed = CASES["sdxl v zero SNR"][1].seed
    assert TIMESTEPS - 1 in timesteps(seed, range(BATCH * STEPS))

from pathlib import Path

import pytest

from eri.adapters.targets import GROUPS, select
from eri.config import TARGETS
from eri.errors import ConfigError
from eri.models import UNet, load_unet
from eri.models.spec import SD15
from tests.tiny import on_meta

COUNTS = {"attn": 128, "ff": 32, "proj": 32, "attn+ff": 160, "attn+ff+proj": 192}


def test_the_groups_are_those_that_a_config_may_name() -> None:
    assert tuple(GROUPS) == TARGETS


@pytest.mark.parametrize(("targets", "count"), COUNTS.items())
def test_how_many_modules_a_group_names(sd15: Path, targets: str, count: int) -> None:
    assert len(select(load_unet(sd15), targets)) == count


def test_on_stable_diffusion_they_are_those_that_kohya_trains() -> None:
    parameters = sum(
        sum(module.weight.shape[:2])
        for module in select(on_meta(UNet, SD15), "attn+ff+proj").values()
    )
    assert parameters == 423_936  # of fan-in and fan-out, times the rank


@pytest.mark.parametrize("targets", ["conv", "attn+", ""])
def test_unknown_groups_are_refused(sd15: Path, targets: str) -> None:
    with pytest.raises(ConfigError, match="unknown target group"):
        select(load_unet(sd15), targets)


def test_a_model_without_such_modules_has_nothing_to_train(sd15: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        select(load_unet(sd15).down[3], "attn+ff+proj")

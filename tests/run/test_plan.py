from collections.abc import Callable
from dataclasses import replace

import pytest

from eri.config import Config
from eri.errors import ConfigError
from eri.run.base import look_at
from eri.run.dataset import look_at_images
from eri.run.plan import RunPlan, auto_steps, plan_run
from eri.run.prediction import choose
from tests.run.conftest import Screen


@pytest.mark.parametrize(
    ("batches", "accumulate", "steps"), [(1, 1, 500), (8, 1, 800), (15, 2, 750), (500, 1, 3000)]
)
def test_auto_steps_show_each_image_a_hundred_times_within_limits(
    batches: int, accumulate: int, steps: int
) -> None:
    assert auto_steps(batches, accumulate) == steps


@pytest.fixture
def plan(screen: Screen) -> Callable[[Config], RunPlan]:
    def planned(config: Config) -> RunPlan:
        facts = look_at(config.model.path)
        images = look_at_images(config, facts, screen.console, lambda: None)
        return plan_run(config, facts, choose(config.model, facts.hint), images)

    return planned


def test_the_plan_says_where_auto_comes_from(
    config: Config, change: Callable[..., Config], plan: Callable[[Config], RunPlan]
) -> None:
    planned = plan(change(config, train={"steps": "auto", "accumulate": 2}))
    assert planned.loop.steps == 500
    assert any("500 steps (auto: 100 views" in line for line in planned.lines)
    # 4 images of one shape and 1 of another are 3 batches of at most 2
    assert any("of up to 4 images, 333.3 epochs" in line for line in planned.lines)


def test_what_is_odd_about_the_model_is_told(config: Config, screen: Screen) -> None:
    facts = replace(look_at(config.model.path), notes=("its tensors are odd",))
    images = look_at_images(config, facts, screen.console, lambda: None)
    lines = plan_run(config, facts, choose(config.model, facts.hint), images).lines
    assert lines[0].startswith("model ") and lines[1].strip() == "its tensors are odd"


def test_without_prompts_the_held_out_captions_are_drawn(
    config: Config, change: Callable[..., Config], plan: Callable[[Config], RunPlan]
) -> None:
    planned = plan(change(config, sample={"prompts": (), "size": "auto"}))
    assert planned.prompts == ("a red disc 0", "a red disc 1")
    assert planned.size == 64


def test_a_preview_that_the_model_cannot_draw_is_refused_at_once(
    config: Config, change: Callable[..., Config], plan: Callable[[Config], RunPlan]
) -> None:
    larger = change(config, sample={"size": 96})  # past the schema, which has multiples of 64
    with pytest.raises(ConfigError, match=r"96 is not a multiple of 64.*sample\.size"):
        plan(larger)


def test_kernels_that_do_not_exist_are_not_promised(
    config: Config, change: Callable[..., Config], plan: Callable[[Config], RunPlan]
) -> None:
    with pytest.raises(ConfigError, match=r"no CUDA kernels.*train\.backend"):
        plan(change(config, train={"backend": "cuda"}))

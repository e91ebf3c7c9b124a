from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from eri.config import CaptionRules, Config, DataSource
from eri.errors import ConfigError
from eri.run.base import look_at
from eri.run.dataset import look_at_images
from eri.run.plan import RunPlan, plan_run
from eri.run.prediction import choose
from eri.run.rates import remember_rate
from eri.run.train import train
from tests.run.conftest import Screen, save_photos


@pytest.fixture
def plan(screen: Screen) -> Callable[[Config], RunPlan]:
    def planned(config: Config) -> RunPlan:
        facts = look_at(config.model.path)
        images = look_at_images(config, facts, screen.console, lambda: None)
        return plan_run(config, facts, choose(config.model, facts.hint), images, dry_run=True)

    return planned


def test_the_plan_is_short_and_says_what_a_run_will_take(
    config: Config, change: Callable[..., Config], plan: Callable[[Config], RunPlan]
) -> None:
    planned = plan(change(config, train={"steps": "auto", "accumulate": 2}))
    assert planned.loop.steps == 500
    lines = planned.lines
    assert len(lines) <= 25
    heads = [
        "model",
        "vae",
        "images",
        "training",
        "prediction",
        "device",
        "memory",
        "cache",
        "time",
    ]
    heads += ["output"]
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == heads
    assert "         64x64            4         4        2   0.0%, 0.0%" in lines
    # 4 images of one shape and 1 of another are 3 batches of at most 2
    assert any("of up to 4 images, 333.3 epochs of 5 samples" in line for line in lines)
    assert any("auto: 5 images x 100 views / 3.333 of them a step = 150," in x for x in lines)
    assert any("for 2 images of 64x64" in line for line in lines)


def test_epochs_and_repeats_reach_the_order_of_the_batches(
    config: Config, change: Callable[..., Config], plan: Callable[[Config], RunPlan]
) -> None:
    source = config.data[0].model_copy(update={"repeats": 3})
    planned = plan(change(config, data=(source,), train={"steps": "auto", "epochs": 2}))
    assert planned.batches.total == 2 * (4 * 3 // 2 + 3)
    assert planned.loop.steps == planned.batches.total
    assert any("2 epochs x 15 samples = 30 samples: 18 batches" in x for x in planned.lines)


def test_images_that_regularize_are_not_counted_as_views_and_are_not_drawn(
    config: Config, change: Callable[..., Config], plan: Callable[[Config], RunPlan], tmp_path: Path
) -> None:
    others = save_photos(tmp_path / "others", count=4)
    own = config.data[0].model_copy(
        update={"validation": None, "caption": CaptionRules(trigger="ohwx", weights=True)}
    )
    kept = DataSource(path=others, regularization=True, resolution=128)
    changed = {"train": {"steps": "auto", "batch_size": 1}, "sample": {"prompts": ()}}
    planned = plan(change(config, data=(kept, own), **changed))
    assert planned.loop.steps == 900  # 5 images of 9 samples that an epoch has in as many steps
    assert any("5 images x 100 views / 0.5556 of them a step = 900," in x for x in planned.lines)
    assert planned.prompts == tuple((f"ohwx, a red disc {number}", True) for number in range(4))
    only = plan(change(config, data=(kept,), **changed))
    assert only.loop.steps == 500  # 4 images: there are no others
    assert only.prompts[0] == ("a red disc 0", False)


def test_time_is_told_once_a_run_like_this_one_was_timed(
    config: Config, change: Callable[..., Config], plan: Callable[[Config], RunPlan]
) -> None:
    first = plan(config)
    assert "time     is known after the first steps" in first.lines
    remember_rate(first.pace, 2.0)
    assert any("about 4 s at 2 images/s" in line for line in plan(config).lines)
    other = plan(change(config, adapter={"rank": 3}))
    assert "time     is known after the first steps" in other.lines


def test_a_run_leaves_its_pace_for_the_next_plan(
    config: Config,
    change: Callable[..., Config],
    plan: Callable[[Config], RunPlan],
    screen: Screen,
) -> None:
    longer = change(config, train={"steps": 5}, sample={"every": 0})
    train(longer, screen.console)
    assert any("measured here on" in line for line in plan(longer).lines)
    assert "cache    all 5 latents and their texts are there" in plan(longer).lines


def test_a_card_that_is_too_small_is_warned_of(
    config: Config, plan: Callable[[Config], RunPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eri.run.plan.card_memory", lambda device: 10_000_000)
    lines = plan(config).lines
    assert any(line.startswith("warning: this GPU has 10 MiB; ") for line in lines)


def test_what_is_odd_about_the_model_is_told(config: Config, screen: Screen) -> None:
    facts = replace(look_at(config.model.path), notes=("its tensors are odd",))
    images = look_at_images(config, facts, screen.console, lambda: None)
    lines = plan_run(config, facts, choose(config.model, facts.hint), images, dry_run=True).lines
    assert lines[0].startswith("model ") and lines[1].strip() == "its tensors are odd"


def test_without_prompts_the_held_out_captions_are_drawn(
    config: Config, change: Callable[..., Config], plan: Callable[[Config], RunPlan]
) -> None:
    planned = plan(change(config, sample={"prompts": (), "size": "auto"}))
    assert planned.prompts == (("a red disc 0", False), ("a red disc 1", False))
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

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from eri.config import CaptionRules, Config, DataSource
from eri.errors import ConfigError, MemoryLimitError
from eri.run.base import look_at
from eri.run.dataset import look_at_images
from eri.run.memory_plan import reserved
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
        "kernels",
        "slower",
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
    assert any("2 images of 64x64 at once" in line for line in lines)


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


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Say how many bytes are free, as if there were a GPU."""
    return lambda size: monkeypatch.setattr("eri.run.plan.free_memory", lambda device: size)


def test_a_batch_that_does_not_fit_is_run_in_parts(
    config: Config,
    change: Callable[..., Config],
    plan: Callable[[Config], RunPlan],
    only: Callable[[int], None],
) -> None:
    config = change(config, train={"batch_size": 4})
    whole = plan(config)
    assert (whole.memory.micro, whole.memory.recompute) == (4, "nothing")
    assert whole.memory.needed is not None
    only(2 * reserved(whole.memory.needed.total))
    assert plan(config).memory.micro == 4
    only(reserved(whole.memory.needed.resident + whole.memory.needed.activations * 3 // 4))
    parts = plan(config)
    assert (parts.memory.micro, parts.memory.recompute) == (2, "nothing")
    assert any("4 images of 64x64 as 2 x 2" in line for line in parts.lines)
    assert parts.pace != whole.pace
    only(reserved(whole.memory.needed.resident))
    assert any(line.startswith("warning: this is more than is free") for line in plan(config).lines)
    only(whole.memory.needed.resident - 1)
    with pytest.raises(MemoryLimitError, match="alone take"):
        plan(config)


def test_the_setting_reaches_the_plan(
    config: Config, change: Callable[..., Config], plan: Callable[[Config], RunPlan]
) -> None:
    small = plan(change(config, train={"memory": "small"})).memory
    assert (small.mode, small.micro, small.recompute) == ("small", 1, "blocks")
    fast = plan(change(config, train={"memory": "fast"})).memory
    assert (fast.mode, fast.micro, fast.recompute) == ("fast", 2, "nothing")


def test_a_run_on_the_cpu_does_not_wait_for_its_memory_to_be_worked_out(
    config: Config, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*anything: object, **more: object) -> None:
        raise AssertionError("the memory was worked out")

    monkeypatch.setattr("eri.run.plan.footprint", refuse)
    facts = look_at(config.model.path)
    images = look_at_images(config, facts, screen.console, lambda: None)
    planned = plan_run(config, facts, choose(config.model, facts.hint), images)
    assert planned.memory.needed is None
    assert not [line for line in planned.lines if line.split()[0] in {"memory", "slower"}]


def test_the_largest_images_count_where_there_are_fewer_of_them(
    config: Config, plan: Callable[[Config], RunPlan], tmp_path: Path
) -> None:
    one = plan(config).memory.needed
    Image.new("RGB", (600, 600)).save(config.data[0].path / "9.png")
    (config.data[0].path / "9.txt").write_text("a large one")
    source = config.data[0].model_copy(update={"resolution": 256})
    planned = plan(config.model_copy(update={"data": (source,)}))
    assert one is not None and planned.memory.needed is not None
    assert any("1 image of 256x256;" in f"{line};" for line in planned.lines)
    assert planned.memory.needed.activations > 3 * one.activations


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

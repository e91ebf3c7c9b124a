from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eri.config import Config
from eri.run.base import look_at
from eri.run.dataset import look_at_images
from eri.run.encoding import Encoder
from eri.run.objective import SampleBatch, validate
from eri.run.parts import Parts, build, encode
from eri.run.plan import plan_run
from eri.run.prediction import choose, schedule_of
from tests.losses import losses
from tests.run.conftest import Screen


@pytest.fixture
def built(screen: Screen) -> Callable[[Config], Parts]:
    def build_for(config: Config) -> Parts:
        facts = look_at(config.model.path)
        images = look_at_images(config, facts, screen.console, lambda: None)
        plan = plan_run(config, facts, choose(config.model, facts.hint), images)
        encoder = Encoder(
            facts,
            dtype=plan.dtype,
            device=plan.device,
            console=screen.console,
            check_stop=lambda: None,
        )
        schedule = schedule_of(facts.noise, plan.choice)
        encoded = encode(config, plan, images, encoder)
        return build(config, plan, facts, encoded, settle=lambda *asked: schedule, say=print)

    return build_for


def test_the_parts_fit_together(config: Config, built: Callable[[Config], Parts]) -> None:
    parts = built(config)
    assert parts.state.step == 0
    trained = parts.state.flat.parameters
    assert trained.keys() == dict(parts.adapter.named_parameters()).keys()
    for name, parameter in parts.adapter.named_parameters():
        assert trained[name] is parameter
    assert parts.unet.training  # adapters' dropout is on
    assert (len(parts.samples), len(parts.validation)) == (5, 2)
    assert parts.previews.prompts == ["a red disc"]
    assert not parts.state.scaling


def test_what_is_measured_and_drawn_does_not_change_how_training_captions_are_read(
    config: Config, change: Callable[..., Config], built: Callable[[Config], Parts]
) -> None:
    (held_out,) = (source.validation for source in config.data)
    assert held_out is not None
    (held_out / "0.txt").write_text("a " * 80)
    config = change(config, sample={"prompts": ("a " * 160, "short")})
    parts = built(config)
    assert (parts.samples.windows, parts.validation.windows) == (1, 2)
    lengths = [[len(one.context) for one in pair] for pair in parts.previews.conditions]
    assert lengths == [[231, 231], [77, 77]]
    (config.data[0].path / "0.txt").write_text("a " * 160)
    parts = built(config)
    assert (parts.samples.windows, parts.validation.windows) == (3, 3)


def test_sdxl_is_trained_measured_and_drawn(
    config: Config, change: Callable[..., Config], sdxl: Path, built: Callable[[Config], Parts]
) -> None:
    parts = built(change(config, model={"path": str(sdxl)}))
    batch = SampleBatch([parts.samples[0], parts.samples[2]], range(2))
    assert losses(parts.objective, batch).isfinite().all()
    assert validate(parts.objective, parts.validation).mean > 0
    (picture,) = parts.previews.draw(0, lambda: False)
    assert picture.size == (64, 64)
    ((prompt, negative),) = parts.previews.conditions
    assert prompt.pooled is not None
    assert negative.pooled is not None
    assert not torch.equal(prompt.pooled, negative.pooled)


def test_the_adapter_is_float32_beside_a_net_in_bf16(
    config: Config, change: Callable[..., Config], built: Callable[[Config], Parts]
) -> None:
    parts = built(change(config, train={"precision": "bf16"}))
    assert {p.dtype for p in parts.adapter.parameters()} == {torch.float32}
    assert parts.unet.conv_in.weight.dtype == torch.bfloat16
    assert parts.unet.dtype == torch.bfloat16


def test_deterministic_is_switched_on_and_off(
    config: Config, change: Callable[..., Config], built: Callable[[Config], Parts]
) -> None:
    built(change(config, train={"deterministic": True}))
    assert torch.are_deterministic_algorithms_enabled()
    built(config)
    assert not torch.are_deterministic_algorithms_enabled()

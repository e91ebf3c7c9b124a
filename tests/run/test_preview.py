from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from eri.adapters import attach
from eri.run.base import load_base, look_at
from eri.run.conditions import Condition, Conditions
from eri.run.preview import Painter, Previews

PROMPTS = [Condition(torch.randn(7, 32)) for _ in range(2)]
NEGATIVE = Condition(torch.randn(7, 32))


@pytest.fixture
def painter(sd15: Path) -> Painter:
    base = load_base(look_at(str(sd15)), dtype=torch.float32, device=torch.device("cpu"))
    return Painter(
        unet=base.unet,
        vae=base.vae,
        schedule=base.schedule,
        sampler="euler",
        steps=2,
        guidance=3.0,
        seed=0,
    )


def paint(painter: Painter, prompts: Sequence[Condition] = PROMPTS) -> list[bytes]:
    return [
        painter.paint(prompt, NEGATIVE, size=64, number=number).tobytes()
        for number, prompt in enumerate(prompts)
    ]


def test_the_same_prompts_give_the_same_pictures(painter: Painter) -> None:
    assert paint(painter) == paint(painter)
    assert paint(painter)[0] != paint(painter)[1]


def test_a_picture_depends_on_its_place_and_not_on_the_others(painter: Painter) -> None:
    assert paint(painter)[:1] == paint(painter, PROMPTS[:1])


def test_guidance_of_one_leaves_the_negative_prompt_out(painter: Painter) -> None:
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    both = Conditions(torch.stack([NEGATIVE.context, PROMPTS[0].context]))
    alone = replace(painter, guidance=1.0)
    with torch.no_grad():
        expected = painter.unet(x, t, PROMPTS[0].context[None])
        torch.testing.assert_close(alone._guided(x, t, both), expected, rtol=1e-4, atol=1e-5)
        without = painter.unet(x, t, NEGATIVE.context[None])
        guided = without + 3.0 * (expected - without)
        torch.testing.assert_close(painter._guided(x, t, both), guided, rtol=1e-4, atol=1e-5)


def test_dropout_is_off_while_painting_and_on_afterwards(painter: Painter) -> None:
    adapter = attach(painter.unet, rank=2, dropout=0.5)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    painter.unet.train()
    assert paint(painter) == paint(painter)
    assert painter.unet.training


@pytest.fixture
def previews(painter: Painter, tmp_path: Path) -> Previews:
    torch.manual_seed(0)
    adapter = attach(painter.unet, rank=2)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return Previews(
        painter=painter,
        adapter=adapter,
        prompts=("one", "two"),
        negative_prompt="bad",
        conditions=[(prompt, NEGATIVE) for prompt in PROMPTS],
        size=64,
        folder=tmp_path / "samples",
    )


def never() -> bool:
    return False


def files(previews: Previews) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(previews.folder.iterdir())}


def test_previews_are_files_by_step_that_say_how_they_were_drawn(previews: Previews) -> None:
    previews.draw(4, never)
    assert list(files(previews)) == ["000004-1.png", "000004-2.png"]
    with Image.open(previews.folder / "000004-2.png") as picture:
        text = picture.info["parameters"]
    assert text.startswith("two\nNegative prompt: bad\nSteps: 2, Sampler: euler, CFG scale: 3")


def test_what_is_on_the_disk_is_not_drawn_again_unless_it_was_drawn_otherwise(
    previews: Previews,
) -> None:
    previews.draw(4, never)
    first = files(previews)
    for parameter in previews.adapter.parameters():
        torch.nn.init.zeros_(parameter)
    previews.draw(4, never)
    assert files(previews) == first
    replace(previews, negative_prompt="other").draw(4, never)
    assert files(previews) != first


def test_step_zero_is_the_base_model_whatever_was_learned_since(previews: Previews) -> None:
    before = [picture.tobytes() for picture in previews.draw(0, never)]
    after = [picture.tobytes() for picture in previews.draw(4, never)]
    assert before != after
    previews.adapter.detach()
    assert before == paint(previews.painter)


def test_asked_to_stop_it_draws_no_further_and_makes_no_sheet(previews: Previews) -> None:
    asked = iter([False, True, True, True, True, True])
    assert len(previews.draw(4, lambda: next(asked))) == 1
    assert previews.sheet(4, [], lambda: True) is None
    path = previews.sheet(4, [Image.new("RGB", (8, 8))], never)
    assert path is not None and path.is_file()
    assert len(files(previews)) == 5

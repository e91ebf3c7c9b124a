from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from eri.adapters import attach
from eri.diffusion import NoiseSchedule
from eri.models import load_unet, load_vae
from eri.run.base import look_at
from eri.run.conditions import Condition, Conditions
from eri.run.preview import Painter, Previews

PROMPTS = [Condition(torch.randn(7, 32)) for _ in range(2)]
NEGATIVE = Condition(torch.randn(7, 32))


@pytest.fixture
def painter(sd15: Path) -> Painter:
    facts = look_at(str(sd15))
    return Painter(
        unet=facts.load_unet(dtype=torch.float32, device=torch.device("cpu")),
        vae=facts.load_vae(),
        schedule=NoiseSchedule(),
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


def test_a_large_picture_is_decoded_in_tiles_if_it_is_asked_for(
    painter: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eri.models.vae.TILE", 32)
    whole, tiled = paint(painter), paint(replace(painter, tiled=True))
    assert whole != tiled
    pixels = [
        torch.frombuffer(bytearray(x), dtype=torch.uint8).float() for x in (whole[0], tiled[0])
    ]
    assert (pixels[0] - pixels[1]).abs().mean() < 0.2 * pixels[0].std() + 8
    monkeypatch.setattr("eri.models.vae.TILE", 64)
    assert paint(replace(painter, tiled=True)) == whole  # it is one tile


def test_dropout_is_off_while_painting_and_on_afterwards(painter: Painter) -> None:
    adapter = attach(painter.unet, rank=2, dropout=0.5)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    painter.unet.train()
    assert paint(painter) == paint(painter)
    assert painter.unet.training


@pytest.fixture
def sdxl_painter(sdxl: Path) -> Painter:
    return Painter(
        unet=load_unet(sdxl),
        vae=load_vae(sdxl),
        schedule=NoiseSchedule(),
        sampler="euler",
        steps=2,
        guidance=3.0,
        seed=0,
    )


def with_pooled(level: float) -> Condition:
    return Condition(torch.ones(7, 128), torch.full((64,), level))


def test_a_picture_depends_on_the_pooled_text_of_both_prompts(sdxl_painter: Painter) -> None:
    def picture(prompt: float, negative: float) -> bytes:
        conditions = with_pooled(prompt), with_pooled(negative)
        return sdxl_painter.paint(*conditions, size=64, number=0).tobytes()

    assert picture(1, 0) == picture(1, 0)
    assert len({picture(1, 0), picture(2, 0), picture(1, 2)}) == 3


def test_sdxl_is_told_of_a_whole_image_of_the_size_that_is_drawn(sdxl_painter: Painter) -> None:
    told: list[tuple[torch.Tensor, ...]] = []
    sdxl_painter.unet.register_forward_pre_hook(lambda _, inputs: told.append(inputs))
    sdxl_painter.paint(with_pooled(1), with_pooled(0), size=96, number=0)
    assert len(told) == 2
    for *_, pooled, time_ids in told:
        assert pooled[:, 0].tolist() == [0, 1]  # the negative prompt first
        assert time_ids.tolist() == [[96, 96, 0, 0, 96, 96]] * 2


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
    previews: Previews, monkeypatch: pytest.MonkeyPatch
) -> None:
    previews.draw(4, never)
    first = files(previews)
    with monkeypatch.context() as patch:
        patch.setattr(Painter, "paint", None)
        previews.draw(4, never)
    assert files(previews) == first
    replace(previews, negative_prompt="other").draw(4, never)
    second = files(previews)
    assert all(second[name] != first[name] for name in first)
    torch.nn.init.zeros_(previews.adapter.parameters()[0])  # as of a run that went back
    replace(previews, negative_prompt="other").draw(4, never)
    assert all(content != second[name] for name, content in files(previews).items())


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


@pytest.mark.parametrize("part", ["sample", "VAE.decode"])
@pytest.mark.parametrize("step", [0, 4])
def test_what_fails_leaves_all_as_training_needs_it(
    previews: Previews, monkeypatch: pytest.MonkeyPatch, part: str, step: int
) -> None:
    def fail(*given: object, **more: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    painter = previews.painter
    painter.unet.train()
    monkeypatch.setattr(f"eri.run.preview.{part}", fail)
    with pytest.raises(torch.OutOfMemoryError):
        previews.draw(step, never)
    assert painter.unet.training
    assert {layer.scale for layer in previews.adapter.layers.values()} == {1.0}
    assert {parameter.device.type for parameter in painter.vae.model.parameters()} == {"cpu"}

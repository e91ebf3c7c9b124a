from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from eri.config import Config
from eri.models.text import TextEncoder
from eri.models.vae import VAE
from eri.run.base import BaseFacts, look_at
from eri.run.dataset import look_at_images
from eri.run.encoding import Encoder, tensor_cores
from eri.run.image_set import ImageSet
from eri.run.memory_plan import ENCODED_PIXEL, WORKSPACES, MemoryPlan
from eri.run.samples import Samples, texts_of
from tests.run.conftest import Screen

CPU = torch.device("cpu")


def go_on() -> None:
    """Nobody asked to stop."""


def look(config: Config, screen: Screen) -> tuple[BaseFacts, ImageSet]:
    facts = look_at(config.model.path)
    return facts, look_at_images(config, facts, screen.console, go_on).train


def encoder_for(facts: BaseFacts, screen: Screen) -> Encoder:
    return Encoder(facts, dtype=torch.float32, device=CPU, console=screen.console, check_stop=go_on)


def encoded(facts: BaseFacts, images: ImageSet, screen: Screen, windows: int = 1) -> Samples:
    encoder = encoder_for(facts, screen)
    latents = encoder.latents(images, facts.load_vae())
    with encoder.reader() as reader:
        wanted = texts_of(images)
        return encoder.samples(images, latents, reader, wanted, least_windows=windows)


def test_samples_are_the_encoded_images_with_their_captions(config: Config, screen: Screen) -> None:
    facts, images = look(config, screen)
    samples = encoded(facts, images, screen)
    assert len(samples) == 5
    assert samples[1].mean.shape == (4, 16, 8)
    assert samples[1].std.min() > 0
    expected, _ = facts.load_text(CPU).encode(["a red disc 3"])
    torch.testing.assert_close(samples[3].context, expected[0])
    assert samples[3].file.endswith("3.png")
    assert samples[3].pooled is None
    assert samples[3].time_ids is None


def test_samples_of_sdxl_have_pooled_text_and_the_sizes_of_their_own_cut(
    config: Config, change: Callable[..., Config], sdxl: Path, screen: Screen
) -> None:
    turned = Image.new("RGB", (240, 100))
    turned.getexif()[0x0112] = 6  # stored lying; upright it is 100 wide and 240 high
    turned.save(config.data[0].path / "3.png", exif=turned.getexif())
    facts, images = look(change(config, model={"path": str(sdxl)}), screen)
    samples = encoded(facts, images, screen)
    context, pooled = facts.load_text(CPU).encode(["a red disc 3", "a red disc 4"])
    assert pooled is not None
    for sample, states, one in zip((samples[3], samples[4]), context, pooled, strict=True):
        assert sample.pooled is not None
        torch.testing.assert_close(sample.context, states)
        torch.testing.assert_close(sample.pooled, one)
    sizes = [ids.tolist() for sample in samples if (ids := sample.time_ids) is not None]
    assert sizes[3:] == [[240, 100, 13, 0, 128, 64], [96, 96, 0, 0, 64, 64]]


def test_the_second_time_nothing_is_encoded_and_no_encoder_is_loaded(
    config: Config, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, images = look(config, screen)
    first = encoded(facts, images, screen)

    def refuse(*anything: object, **more: object) -> None:
        raise AssertionError("something was encoded again")

    monkeypatch.setattr(VAE, "encode", refuse)
    monkeypatch.setattr(TextEncoder, "encode", refuse)
    again = encoded(facts, images, screen)
    assert torch.equal(again[0].mean, first[0].mean)
    assert torch.equal(again[0].context, first[0].context)
    (config.data[0].path / "0.txt").write_text("a blue disc")
    with pytest.raises(AssertionError, match="encoded again"):
        encoded(*look(config, screen), screen)


def test_a_mask_that_the_cut_removes_is_pointed_out(
    config: Config, change: Callable[..., Config], screen: Screen
) -> None:
    folder = config.data[0].path
    Image.new("RGB", (400, 100)).save(folder / "0.png")
    for name, corner in (("0", 350), ("2", 40)):  # of 0.png, a cut of 2:1 keeps 100 to 300
        mask = Image.new("L", (400, 100) if name == "0" else (96, 96))
        mask.paste(255, (corner, 0, mask.width, mask.height))
        mask.save(folder / f"{name}-masklabel.png")
    source = config.data[0].model_copy(update={"mask": "file"})
    samples = encoded(*look(change(config, data=(source,)), screen), screen)
    assert "a cut keeps nothing of their mask (1): " in screen.text
    assert "0.png; these samples teach nothing" in screen.text
    light = change(config, data=(source.model_copy(update={"unmasked_weight": 0.1}),))
    encoded(*look(light, screen), screen)
    assert "0.png; these samples teach what the mask leaves out" in screen.text
    masks = [sample.mask for sample in samples]
    assert masks[0] is not None and masks[2] is not None and masks[1] is None
    assert not masks[0].any() and 0.5 < masks[2].mean() < 0.65


class Ways:
    """A VAE that notes how it encodes, and runs out of memory where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, most: float = float("inf")) -> None:
        self.whole: list[int] = []  # pixels
        self.tiled: list[int] = []
        encode = VAE.encode

        def noted(vae: VAE, images: Tensor, tiled: bool = False) -> tuple[Tensor, Tensor]:
            pixels = images[0, 0].numel()
            (self.tiled if tiled else self.whole).append(pixels)
            if pixels > most and not tiled:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return encode(vae, images)

        monkeypatch.setattr(VAE, "encode", noted)
        monkeypatch.setattr("eri.models.vae.TILE", 64)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def test_an_image_that_did_not_fit_is_not_tried_whole_again(
    config: Config, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (64, 128)).save(config.data[0].path / "0.png")  # another one of 1.png's shape
    facts, images = look(config, screen)
    ways = Ways(monkeypatch, most=64 * 64)
    encoder_for(facts, screen).latents(images, facts.load_vae())
    assert sorted(ways.tiled) == [64 * 128] * 2
    assert sorted(ways.whole) == [64 * 64] * 3 + [64 * 128]


def test_images_that_would_not_fit_are_encoded_in_tiles_at_once(
    config: Config, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, images = look(config, screen)
    ways = Ways(monkeypatch)
    encoder = encoder_for(facts, screen)
    vae = facts.load_vae()
    weights = sum(p.nbytes for p in vae.model.parameters())
    encoder.memory = MemoryPlan(
        mode="auto",
        micro=1,
        lean=True,
        recompute="nothing",
        free=weights + WORKSPACES + ENCODED_PIXEL * 64 * 100,
    )
    latents = encoder.latents(images, vae)
    assert ways.tiled == [64 * 128] and ways.whole == [64 * 64] * 4
    assert len(latents) == 5


def test_states_are_kept_in_the_type_that_they_are_used_in(config: Config, screen: Screen) -> None:
    facts, images = look(config, screen)
    encoder = Encoder(
        facts, dtype=torch.bfloat16, device=CPU, console=screen.console, check_stop=go_on
    )
    latents = encoder.latents(images, facts.load_vae())
    with encoder.reader() as reader:
        samples = encoder.samples(images, latents, reader, texts_of(images))
        (given, without) = reader.guide("a disc", "")
    assert samples[0].context.dtype == given.context.dtype == without.context.dtype
    assert samples[0].context.dtype == torch.bfloat16
    assert samples[0].mean.dtype == torch.float32


def test_a_caption_is_read_as_text_or_with_its_weights(
    config: Config, change: Callable[..., Config], screen: Screen
) -> None:
    (config.data[0].path / "0.txt").write_text("a (red:1.5) disc")
    facts, images = look(config, screen)
    literal = encoded(facts, images, screen)[0].context
    rules = config.data[0].caption.model_copy(update={"weights": True})
    weighing = config.data[0].model_copy(update={"caption": rules})
    weighted = encoded(*look(change(config, data=(weighing,)), screen), screen)[0].context
    text = facts.load_text(CPU)
    torch.testing.assert_close(literal, text.encode(["a (red:1.5) disc"])[0][0])
    torch.testing.assert_close(weighted, text.encode(["a (red:1.5) disc"], weighted=True)[0][0])
    assert not torch.equal(literal, weighted)


def test_a_guide_is_as_long_as_the_longer_of_its_texts(config: Config, screen: Screen) -> None:
    facts, _ = look(config, screen)
    with encoder_for(facts, screen).reader() as reader:
        given, without = reader.guide("short", "a " * 80)
        assert len(given.context) == len(without.context) == 154


@pytest.mark.parametrize("weighted", [True, False])
def test_a_caption_as_prompt_may_be_literal_and_a_negative_prompt_never_is(
    weighted: bool, config: Config, screen: Screen
) -> None:
    facts, _ = look(config, screen)
    with encoder_for(facts, screen).reader() as reader:
        found = reader.guide("a (red:1.5) disc", "(blue:2)", weighted=weighted)
    texts = ["a (red:1.5) disc", "(blue:2)"]
    expected, _ = facts.load_text(CPU).encode(texts, weighted=[weighted, True])
    torch.testing.assert_close(torch.stack([one.context for one in found]), expected)


def test_held_out_captions_are_read_as_those_of_training_or_longer(
    config: Config, screen: Screen
) -> None:
    facts, images = look(config, screen)
    assert encoded(facts, images, screen).windows == 1
    assert encoded(facts, images, screen, windows=2)[0].context.shape == (154, 32)
    assert encoded(facts, ImageSet(), screen, windows=2).windows == 2


@pytest.mark.parametrize("before", [True, False])
def test_tensor_cores_are_used_within_a_block_only(
    before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
    with pytest.raises(ZeroDivisionError), tensor_cores():
        assert torch.backends.cudnn.allow_tf32
        raise ZeroDivisionError
    assert torch.backends.cudnn.allow_tf32 == before

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from eri.config import Config
from eri.errors import Stopped
from eri.run.base import load_base, look_at
from eri.run.dataset import Encoder, Images, ImageSet, look_at_images
from tests.run.conftest import Screen

CPU = torch.device("cpu")


def go_on() -> None:
    """Nobody asked to stop."""


@pytest.fixture
def images(config: Config, screen: Screen) -> Images:
    return look_at_images(config, look_at(config.model.path), screen.console, go_on)


def test_images_are_cut_to_shapes_that_the_net_can_halve(images: Images, screen: Screen) -> None:
    assert len(images.train) == 5
    assert len(images.validation) == 2
    assert [tuple(shape) for shape in images.train.shapes] == [(64, 64), (128, 64), *[(64, 64)] * 3]
    assert "note: images smaller than the resolution, kept at their size (4)" in screen.text
    assert [example.size for example in images.examples()] == [(96, 96), (64, 128), *[(96, 96)] * 2]


def test_samples_are_the_encoded_images_with_their_captions(
    config: Config, images: Images, screen: Screen
) -> None:
    base = load_base(look_at(config.model.path), dtype=torch.float32, device=CPU)
    samples = Encoder(screen.console, go_on).samples(base, images.train)
    assert len(samples) == 5
    assert samples[1].mean.shape == (4, 16, 8)
    assert samples[1].std.min() > 0
    expected, _ = base.text.encode(["a red disc 3"])
    torch.testing.assert_close(samples[3].context, expected[0])
    assert samples[3].file.endswith("3.png")
    assert samples[3].pooled is None
    assert samples[3].time_ids is None


def test_samples_of_sdxl_have_pooled_text_and_the_sizes_of_their_own_cut(
    config: Config, change: Callable[..., Config], sdxl: Path, screen: Screen
) -> None:
    config = change(config, model={"path": str(sdxl)})
    turned = Image.new("RGB", (240, 100))
    turned.getexif()[0x0112] = 6  # stored lying; upright it is 100 wide and 240 high
    turned.save(config.data[0].path / "3.png", exif=turned.getexif())
    facts = look_at(config.model.path)
    images = look_at_images(config, facts, screen.console, go_on)
    base = load_base(facts, dtype=torch.float32, device=CPU)
    samples = Encoder(screen.console, go_on).samples(base, images.train)
    context, pooled = base.text.encode(["a red disc 3", "a red disc 4"])
    assert pooled is not None
    for sample, states, one in zip((samples[3], samples[4]), context, pooled, strict=True):
        assert sample.pooled is not None
        torch.testing.assert_close(sample.context, states)
        torch.testing.assert_close(sample.pooled, one)
    sizes = [ids.tolist() for sample in samples if (ids := sample.time_ids) is not None]
    assert sizes[3:] == [[240, 100, 13, 0, 128, 64], [96, 96, 0, 0, 96, 96]]


def test_the_second_time_nothing_is_encoded(
    config: Config, images: Images, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(look_at(config.model.path), dtype=torch.float32, device=CPU)
    encoder = Encoder(screen.console, go_on)
    first = encoder.samples(base, images.train)

    def encode(images: torch.Tensor) -> None:
        raise AssertionError("an image was encoded again")

    monkeypatch.setattr(base.vae, "encode", encode)
    again = encoder.samples(base, images.train)
    assert torch.equal(again[0].mean, first[0].mean)


def test_a_caption_that_is_too_long_is_told(config: Config, screen: Screen) -> None:
    facts = look_at(config.model.path)
    (config.data[0].path / "0.txt").write_text("a " * 230)
    images = look_at_images(config, facts, screen.console, go_on)
    base = load_base(facts, dtype=torch.float32, device=CPU)
    samples = Encoder(screen.console, go_on).samples(base, images.train)
    assert "0.png: the caption has 5 tokens more than the 225 that the model reads" in screen.text
    assert screen.text.count("its end is cut off") == 1
    assert samples.windows == 3


def test_one_long_caption_makes_all_of_them_long(config: Config, screen: Screen) -> None:
    facts = look_at(config.model.path)
    (config.data[0].path / "0.txt").write_text("a " * 80)
    images = look_at_images(config, facts, screen.console, go_on)
    base = load_base(facts, dtype=torch.float32, device=CPU)
    samples = Encoder(screen.console, go_on).samples(base, images.train)
    assert {sample.context.shape for sample in samples} == {(154, 32)}
    assert "note: the longest caption has 80 tokens (" in screen.text
    assert "0.png); captions are encoded in 2 windows of 77, 154 states each" in screen.text
    assert "cut off" not in screen.text


def test_held_out_captions_are_read_as_those_of_training_or_longer(
    config: Config, images: Images, screen: Screen
) -> None:
    base = load_base(look_at(config.model.path), dtype=torch.float32, device=CPU)
    encoder = Encoder(screen.console, go_on)
    assert encoder.samples(base, images.validation).windows == 1
    assert encoder.samples(base, images.validation, 2)[0].context.shape == (154, 32)
    assert "longest caption" not in screen.text
    assert encoder.samples(base, ImageSet(), 2).windows == 2


def test_asked_to_stop_it_stops_between_two_images(config: Config, screen: Screen) -> None:
    asked = 0

    def stop_at_the_third() -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise Stopped(15)

    with pytest.raises(Stopped):
        look_at_images(config, look_at(config.model.path), screen.console, stop_at_the_third)


def test_files_that_are_skipped_are_told(
    config: Config, change: Callable[..., Config], screen: Screen
) -> None:
    (config.data[0].path / "2.png").write_bytes(b"\x89PNG broken")
    source = config.data[0].model_copy(update={"on_bad": "skip"})
    facts = look_at(config.model.path)
    images = look_at_images(change(config, data=(source,)), facts, screen.console, go_on)
    assert len(images.train) == 4
    assert "2.png" in screen.text

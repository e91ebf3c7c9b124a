from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
from PIL import Image

from eri.config import Config
from eri.data import PLAIN
from eri.errors import DataError, Stopped
from eri.run.base import look_at
from eri.run.dataset import Images, look_at_images
from tests.run.conftest import Screen


def go_on() -> None:
    """Nobody asked to stop."""


@pytest.fixture
def images(config: Config, screen: Screen) -> Images:
    return look_at_images(config, look_at(config.model.path), screen.console, go_on)


def test_images_are_cut_to_shapes_that_the_net_can_halve(images: Images, screen: Screen) -> None:
    assert len(images.train) == 5
    assert len(images.validation) == 2
    assert [tuple(shape) for shape in images.train.shapes] == [(64, 64), (128, 64), *[(64, 64)] * 3]
    assert "note: images smaller than the resolution, not enlarged (4)" in screen.text
    assert [one.size for one in images.examples(100)] == [(96, 96), (50, 100), *[(96, 96)] * 2]


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


def test_what_a_folder_asks_for_is_done_in_training_and_not_where_is_measured(
    config: Config, change: Callable[..., Config], screen: Screen
) -> None:
    asked = {"flip": True, "color": 0.1, "variants": 3, "repeats": 2}
    source = config.data[0].model_copy(update=asked)
    facts = look_at(config.model.path)
    images = look_at_images(change(config, data=(source,)), facts, screen.console, go_on)
    assert [len(views) for views in images.train.views] == [6] * 5
    assert len(images.train.cuts) == 30
    assert images.train.repeats == (2,) * 5
    assert [cut.view for cut in images.validation.cuts] == [PLAIN] * 2
    assert images.validation.repeats == (1, 1)


def test_a_trigger_that_nobody_set_is_pointed_out(config: Config, screen: Screen) -> None:
    (config.data[0].path / "3.txt").write_text("[trigger] on blue")
    look_at_images(config, look_at(config.model.path), screen.console, go_on)
    assert "[trigger], which stays text without caption.trigger (1): " in screen.text


def test_a_trigger_in_regularization_images_is_taken_out_and_not_pointed_out(
    config: Config, change: Callable[..., Config], screen: Screen
) -> None:
    (config.data[0].path / "3.txt").write_text("[trigger] on blue")
    source = config.data[0].model_copy(update={"regularization": True})
    facts = look_at(config.model.path)
    look_at_images(change(config, data=(source,)), facts, screen.console, go_on)
    assert "[trigger]" not in screen.text


def look_and_fail(config: Config, screen: Screen) -> DataError:
    with pytest.raises(DataError) as caught:
        look_at_images(config, look_at(config.model.path), screen.console, go_on)
    return caught.value


def test_a_validation_folder_that_is_not_there_is_told_before_anything_is_read(
    config: Config, change: Callable[..., Config], screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[object] = []
    monkeypatch.setattr("eri.data.folder.check", lambda *task, **rest: read.append(task))
    gone = config.data[0].path / "gone"
    source = config.data[0].model_copy(update={"validation": gone})
    error = look_and_fail(change(config, data=(source,)), screen)
    assert (error.what, error.where, read) == ("no such folder", str(gone), [])


def test_what_is_wrong_with_training_and_validation_images_is_told_at_once(
    config: Config, screen: Screen
) -> None:
    held_out = config.data[0].validation
    assert held_out is not None
    bad = [config.data[0].path / "2.png", held_out / "1.png"]
    for path in bad:
        path.write_bytes(b"x")
    error = look_and_fail(config, screen)
    assert error.what == "2 of 7 images cannot be used"
    faults = [line.split(": ")[0] for line in error.problems if not line.startswith("note: ")]
    assert sorted(faults) == sorted(map(str, bad))


def test_a_validation_folder_of_which_nothing_is_left_is_named(
    config: Config, change: Callable[..., Config], screen: Screen
) -> None:
    held_out = config.data[0].validation
    assert held_out is not None
    for path in held_out.glob("*.png"):
        path.write_bytes(b"x")
    source = config.data[0].model_copy(update={"on_bad": "skip"})
    error = look_and_fail(change(config, data=(source,)), screen)
    assert (error.what, error.where) == (
        "no image is left; every one was skipped",
        str(held_out),
    )


def test_validation_images_belong_to_their_own_folders(
    config: Config, change: Callable[..., Config], screen: Screen, tmp_path: Path
) -> None:
    (first,) = config.data
    held_out = first.validation
    assert held_out is not None
    plain = first.model_copy(update={"validation": None})
    others = [copytree(folder, tmp_path / folder.name[::-1]) for folder in (held_out, first.path)]
    turned = first.model_copy(update=dict(zip(("path", "validation"), others, strict=True)))
    data = (plain, first, turned)
    facts = look_at(config.model.path)
    images = look_at_images(change(config, data=data), facts, screen.console, go_on)
    assert [item.source for item in images.train.items] == [0] * 5 + [1] * 5 + [2] * 2
    assert [item.source for item in images.validation.items] == [0] * 2 + [1] * 5
    for index, item in enumerate(images.validation.items):
        assert item.path.parent == images.validation.source(index).path


def test_what_is_held_out_is_not_trained_on_wherever_it_lies(
    config: Config, change: Callable[..., Config], screen: Screen
) -> None:
    (source,) = config.data
    assert source.validation is not None
    inside = source.path / "val"
    source.validation.rename(inside)
    facts = look_at(config.model.path)
    changed = change(config, data=(source.model_copy(update={"validation": inside}),))
    images = look_at_images(changed, facts, screen.console, go_on)
    assert (len(images.train), len(images.validation)) == (5, 2)
    assert "note: held out for validation, so not trained on (2): " in screen.text
    whole = change(config, data=(source.model_copy(update={"validation": source.path}),))
    error = look_and_fail(whole, screen)
    assert error.what.startswith("every image of this folder is in a validation folder")
    assert error.where == str(source.path)


def test_a_file_of_two_folders_is_pointed_out(
    config: Config, change: Callable[..., Config], screen: Screen
) -> None:
    source = config.data[0].model_copy(update={"validation": None})
    (source.path / "more").mkdir()
    for name in ("0.png", "0.txt"):
        (source.path / name).rename(source.path / "more" / name)
    data = (source, source.model_copy(update={"path": source.path / "more"}))
    facts = look_at(config.model.path)
    images = look_at_images(change(config, data=data), facts, screen.console, go_on)
    assert len(images.train) == 6
    assert "in two folders of data, so trained on as often as both say (1): " in screen.text


def test_jitter_that_moves_nothing_is_pointed_out(
    config: Config, change: Callable[..., Config], screen: Screen
) -> None:
    source = config.data[0].model_copy(update={"crop_jitter": 0.2, "resolution": 64})
    Image.new("RGB", (64, 64)).save(source.path / "0.png")
    facts = look_at(config.model.path)
    images = look_at_images(change(config, data=(source,)), facts, screen.console, go_on)
    assert images.train.unmoved == [source.path / "0.png"]
    assert "crop_jitter moves nothing in images as small as their shape (1): " in screen.text


def test_regularization_images_are_not_shown_as_what_is_learned(
    config: Config, change: Callable[..., Config], screen: Screen
) -> None:
    (source,) = config.data
    learned = source.model_copy(update={"validation": None})
    other = learned.model_copy(update={"path": source.validation, "regularization": True})
    changed = change(config, data=(learned, other))
    images = look_at_images(changed, look_at(config.model.path), screen.console, go_on)
    assert len(images.train) == 7
    assert [images.train.source(index).regularization for index in (0, 6)] == [False, True]
    assert len(images.examples(64)) == 4

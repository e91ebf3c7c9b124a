import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from eri.config import CaptionRules, Config, DataSource
from eri.data import Item, Shape
from eri.errors import DiskError
from eri.run.base import look_at
from eri.run.cache_space import CacheSpace, most_texts
from eri.run.dataset import look_at_images
from eri.run.image_set import ImageSet
from eri.run.plan import plan_run
from eri.run.prediction import choose
from eri.run.train import train
from tests.run.conftest import Screen

BYTES_OF_A_TEXT = 4 * 77 * 32  # states of 32 numbers, in a window


def needed(config: Config) -> CacheSpace:
    facts = look_at(config.model.path)
    images = look_at_images(config, facts, Screen().console, lambda: None)
    return plan_run(config, facts, choose(config.model, facts.hint), images).space


def written(cache: Path, kind: str) -> int:
    return sum(path.stat().st_size for path in cache.rglob(f"*.{kind}"))


@pytest.fixture
def short(config: Config, change: Callable[..., Config]) -> Config:
    """A run of one step that draws nothing."""
    return change(config, sample={"every": 0, "prompts": ("a red disc 0",)}, train={"steps": 1})


@pytest.fixture
def leave(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Leaves so many bytes free."""
    usage = shutil.disk_usage("/")

    def left(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))

    return left


def test_what_a_run_writes_is_what_was_worked_out(short: Config, isolated_cache: Path) -> None:
    before = needed(short)
    # the two that are held out are two of the five that are trained on
    assert (before.latents, before.missing, before.texts) == (5, 5, 5)
    train(short, Screen().console)
    texts = before.texts * BYTES_OF_A_TEXT
    latents = written(isolated_cache, "latent")
    assert latents <= before.needed - texts == pytest.approx(latents, rel=0.1)
    after = needed(short)
    assert (after.latents, after.missing, after.texts, after.needed) == (5, 0, 0, 0)


def test_captions_that_were_edited_count_though_all_latents_are_there(
    short: Config, change: Callable[..., Config], isolated_cache: Path
) -> None:
    train(short, Screen().console)
    before = written(isolated_cache, "text")
    (short.data[0].path / "3.txt").write_text("disc " * 100)
    edited = change(short, output=short.output / "again")
    space = needed(edited)  # all captions, held out or not, are read in three windows now
    assert (space.missing, space.texts, space.needed) == (0, 5, 5 * 3 * BYTES_OF_A_TEXT)
    train(edited, Screen().console)
    assert written(isolated_cache, "text") - before == pytest.approx(space.needed, rel=0.1)
    assert needed(edited).needed == 0


def test_a_run_counts_no_more_texts_than_it_has_samples(
    short: Config, change: Callable[..., Config], leave: Callable[[int], None]
) -> None:
    rules = CaptionRules(shuffle_tags=True, variants=1000)
    tags = change(short, data=(short.data[0].model_copy(update={"caption": rules}),))
    assert needed(change(tags, train={"steps": 100_000})).texts == 5 * 1000 + 2
    few = change(tags, train={"steps": 3})  # an epoch: 3 batches of 5 samples in all
    assert needed(few).texts == 5 + 5 + 2
    leave(0)
    assert needed(few).texts == 5  # drawn: captions of one tag have one order


def test_versions_of_images_count_each(short: Config, change: Callable[..., Config]) -> None:
    source = short.data[0].model_copy(
        update={"flip": True, "crop_jitter": 0.2, "variants": 3, "validation": None}
    )
    assert needed(change(short, data=(source,))).latents == 5 * 3 * 2


def test_a_full_disk_is_refused_once_the_plan_is_told(
    short: Config, leave: Callable[[int], None]
) -> None:
    space = needed(short)
    leave(space.needed - 1)
    screen = Screen()
    train(short, screen.console, dry_run=True)
    assert "warning: only" in screen.text
    screen = Screen()
    with pytest.raises(DiskError, match=r"are needed and .* are free"):
        train(short, screen.console)
    assert "warning: only" in screen.text
    leave(space.needed)
    needed(short).require()


def test_a_finished_run_needs_no_room_in_the_cache(
    short: Config, isolated_cache: Path, leave: Callable[[int], None]
) -> None:
    train(short, Screen().console)
    shutil.rmtree(isolated_cache)
    leave(0)
    screen = Screen()
    train(short, screen.console)
    assert "this run is finished" in screen.text


@pytest.mark.parametrize(
    ("rules", "texts"),
    [
        ({}, 3),
        ({"drop": 0.1}, 4),
        ({"shuffle_tags": True, "variants": 5}, 15),
        ({"drop_tags": 0.5, "variants": 5, "drop": 0.1}, 16),
        ({"wildcards": True, "variants": 2}, 6),
        ({"lines": True}, 4),
    ],
)
def test_texts_are_counted_as_chance_may_make_them(rules: dict, texts: int) -> None:
    captions = [("a, b",), ("c", "d\ne"), ("a, b", "c")]
    items = tuple(
        Item(path=Path("x"), captions=some, width=64, height=64, sha256="", source=0)
        for some in captions
    )
    source = DataSource.model_validate({"path": "x", "caption": rules})
    assert most_texts(ImageSet(items, (Shape(64, 64),) * 3, (source,))) == texts

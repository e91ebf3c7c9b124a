import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eri.config import Config, DataSource
from eri.data import Item, Shape
from eri.errors import DiskError
from eri.run.base import BaseFacts, look_at
from eri.run.cache_space import CacheSpace, cache_space, most_texts
from eri.run.dataset import look_at_images
from eri.run.image_set import ImageSet
from eri.run.train import train
from tests.run.conftest import Screen

CPU = torch.device("cpu")


def needed(config: Config) -> CacheSpace:
    facts: BaseFacts = look_at(config.model.path)
    images = look_at_images(config, facts, Screen().console, lambda: None)
    return cache_space(facts, images, dtype=torch.float32, device=CPU)


def test_what_a_run_writes_is_what_was_worked_out(
    config: Config, change: Callable[..., Config], isolated_cache: Path
) -> None:
    before = needed(config)
    # the two that are held out are two of the five that are trained on
    assert (before.latents, before.missing, before.texts) == (5, 5, 7)
    prompts = change(config, sample={"every": 0, "prompts": ("a red disc 0",)}, train={"steps": 1})
    train(prompts, Screen().console)
    written = sum(path.stat().st_size for path in (isolated_cache / "latents").rglob("*.latent"))
    texts = before.texts * 4 * 77 * 32  # states of 32 numbers
    assert before.needed - texts == pytest.approx(written, rel=0.1)
    assert before.needed - texts >= written
    after = needed(config)
    assert (after.latents, after.missing, after.needed) == (5, 0, 0)


def test_versions_of_images_count_each(config: Config, change: Callable[..., Config]) -> None:
    source = config.data[0].model_copy(
        update={"flip": True, "crop_jitter": 0.2, "variants": 3, "validation": None}
    )
    assert needed(change(config, data=(source,))).latents == 5 * 3 * 2


def test_a_full_disk_is_refused_before_anything_slow(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = needed(config)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=space.needed - 1))
    with pytest.raises(DiskError, match=r"are needed and .* are free"):
        needed(config)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=space.needed))
    assert needed(config).free == space.needed


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

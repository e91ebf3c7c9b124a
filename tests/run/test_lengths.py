from dataclasses import replace
from pathlib import Path

import pytest

from eri.config import DataSource
from eri.data import Item, Shape
from eri.models.words import Words, load_words
from eri.run.image_set import ImageSet
from eri.run.lengths import length_notes, windows_needed


def images(*captions: str, **rules: object) -> ImageSet:
    items = tuple(
        Item(path=Path(f"{n}.png"), captions=(text,), width=64, height=64, sha256="00", source=0)
        for n, text in enumerate(captions)
    )
    source = DataSource.model_validate({"path": "a", "caption": rules})
    return ImageSet(items, (Shape(64, 64),) * len(items), (source,), 64)


def notes(found: ImageSet, words: Words) -> list[str]:
    return length_notes(replace(found, windows=windows_needed(found, words)), words)


@pytest.fixture
def words(sd15: Path) -> Words:
    return load_words(sd15)


def test_captions_of_one_window_need_no_word(words: Words) -> None:
    assert notes(images("a " * 75, "short"), words) == []
    assert notes(ImageSet(), words) == []


def test_one_long_caption_makes_all_of_them_long(words: Words) -> None:
    assert notes(images("short", "a " * 80), words) == [
        "the longest caption has 80 tokens (1.png), more than the 75 of a window; all captions "
        "are encoded in 2 windows"
    ]


def test_a_caption_that_is_too_long_is_told(words: Words) -> None:
    first, second = notes(images("a " * 230, "a " * 225, "a " * 226), words)
    assert first.startswith("the longest caption has 230 tokens (0.png), more than the 75 of a")
    assert first.endswith("all captions are encoded in 3 windows")
    assert second == (
        "captions with more than the 225 tokens that the model reads, whose ends are cut off (2): "
        "0.png by 5, 2.png by 1"
    )


def test_it_is_the_caption_with_its_rules_that_counts(words: Words) -> None:
    assert notes(images("a " * 70, prefix="a " * 10), words)
    assert not notes(images("(" * 20 + "a " * 50 + ":1.2)" * 20, weights=True), words)
    assert notes(images("(" * 20 + "a " * 50 + ":1.2)" * 20), words)


def test_every_caption_counts_that_can_be_drawn(words: Words) -> None:
    found = images("short\n" + "a " * 80, lines=True)
    assert windows_needed(found, words) == 2
    assert "80 tokens (0.png)" in notes(found, words)[0]
    assert windows_needed(images("{a|" + "a " * 80 + "}", wildcards=True), words) == 2
    assert windows_needed(images("a, " * 60, drop_tags=0.9), words) == 2

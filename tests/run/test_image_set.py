from dataclasses import replace
from pathlib import Path

import pytest

from eri.config import DataSource
from eri.data import PLAIN, Cut, Item, Mask, Shape
from eri.run.image_set import ImageSet

SHAPE = Shape(64, 64)


def item(number: int, source: int = 0) -> Item:
    return Item(
        path=Path(f"{number}.png"),
        captions=(f"picture {number}",),
        width=80,
        height=64,
        sha256=f"{number:064x}",
        source=source,
    )


SOURCES = (DataSource(path=Path("a")), DataSource(path=Path("b"), flip=True, repeats=3))
IMAGES = ImageSet((item(0), item(1), item(2, 1)), (SHAPE,) * 3, SOURCES, 64)


def test_each_image_has_the_settings_of_its_folder() -> None:
    assert len(IMAGES) == 3
    assert IMAGES.repeats == (1, 1, 3)
    assert IMAGES.source(2) is SOURCES[1]
    assert [len(views) for views in IMAGES.views] == [1, 1, 2]


def test_the_cuts_are_every_version_of_every_image() -> None:
    assert IMAGES.cuts[:2] == (Cut(item(0), SHAPE, PLAIN), Cut(item(1), SHAPE, PLAIN))
    assert [cut.view.flip for cut in IMAGES.cuts] == [False, False, False, True]


MASK = Mask(path=Path("m.png"), sha256="ab", alpha=False)
BLUE = replace(item(0), background="#0000ff")
CHANGES = {
    "bytes": {"items": (item(9), *IMAGES.items[1:])},
    "caption": {"items": (replace(item(0), captions=("another",)), *IMAGES.items[1:])},
    "one more caption": {
        "items": (replace(item(0), captions=("picture 0", "")), *IMAGES.items[1:])
    },
    "background": {"items": (BLUE, *IMAGES.items[1:])},
    "mask": {"items": (replace(item(0), mask=MASK), *IMAGES.items[1:])},
    "folder": {"items": (item(0, 1), *IMAGES.items[1:])},
    "order": {"items": IMAGES.items[::-1]},
    "shape": {"shapes": (SHAPE, SHAPE, Shape(64, 128))},
    "view": {"sources": (SOURCES[0], SOURCES[0])},
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_is_of_all_that_is_trained_on(change: str) -> None:
    assert replace(IMAGES, **CHANGES[change]).fingerprint != IMAGES.fingerprint


def test_the_fingerprint_is_not_of_where_things_lie() -> None:
    moved = tuple(replace(one, path=Path("elsewhere") / one.path) for one in IMAGES.items)
    assert replace(IMAGES, items=moved).fingerprint == IMAGES.fingerprint


def test_what_regularizes_is_learned_from_only_where_there_is_nothing_else() -> None:
    kept = SOURCES[0].model_copy(update={"regularization": True})
    assert IMAGES.learned == (0, 1, 2)
    assert replace(IMAGES, sources=(kept, SOURCES[1])).learned == (2,)
    assert replace(IMAGES, sources=(kept, kept)).learned == (0, 1, 2)

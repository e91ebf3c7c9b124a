import hashlib
from pathlib import Path

import eri
from eri.models.vocabulary import END, START, clip_vocabulary

FOLDER = Path(eri.__file__).parent / "models" / "clip"
MERGES = "9f0d3084475096daab61949a23d7e0a6e209be37fb6fe7986fc8d9a53262a30e"


def test_the_file_is_the_one_that_its_card_names() -> None:
    assert hashlib.sha256((FOLDER / "merges.txt.gz").read_bytes()).hexdigest() == MERGES
    assert MERGES in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_ids_are_those_of_clip() -> None:
    vocabulary = clip_vocabulary()
    ids = vocabulary.ids
    assert len(ids) == 49408
    assert sorted(ids.values()) == list(range(49408))
    assert len(vocabulary.merges) == 48894
    assert (ids[START], ids[END]) == (49406, 49407)
    assert (ids["!"], ids["~"], ids["!</w>"], ids["in"]) == (0, 93, 256, 512)
    assert [ids[f"{word}</w>"] for word in "a photo of a cat".split()] == [
        320,
        1125,
        539,
        320,
        2368,
    ]
    assert vocabulary.merges[0] == ("i", "n")
    assert vocabulary.merges[-1] == ("jeky", "ll</w>")


def test_every_byte_has_a_token() -> None:
    ids = clip_vocabulary().ids
    assert all(len(token) == 1 for token, index in ids.items() if index < 256)

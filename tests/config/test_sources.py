from pathlib import Path

import pytest
from pydantic import ValidationError

from eri.config import CaptionRules, DataSource


def source(**settings: object) -> DataSource:
    return DataSource.model_validate({"path": "photos", **settings})


def test_a_folder_alone_shows_every_image_once_as_it_is() -> None:
    found = source()
    assert found.path == Path("photos")
    assert (found.repeats, found.weight, found.regularization) == (1, 1.0, False)
    assert (found.flip, found.crop_jitter, found.color, found.mask) == (False, 0.0, 0.0, "none")
    rules = found.caption
    assert (rules.prefix, rules.suffix, rules.trigger, rules.drop) == ("", "", None, 0.0)
    assert not (rules.lines or rules.wildcards or rules.shuffle_tags or rules.weights)


def test_the_rules_of_captions_stand_below_the_source() -> None:
    found = source(caption={"trigger": "ohwx", "keep_tags": 2, "drop_tags": 0.1})
    assert found.caption == CaptionRules(trigger="ohwx", keep_tags=2, drop_tags=0.1)


@pytest.mark.parametrize("color", ["#00FF7f", "#000000"])
def test_a_color_is_six_hex_digits(color: str) -> None:
    assert source(background=color).background == color.lower()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("background", "white"),
        ("background", "#fff"),
        ("background", "#00000000"),
        ("repeats", 0),
        ("repeats", 1.5),
        ("weight", 0),
        ("resolution", 63),
        ("resolution", "big"),
        ("mask", "yes"),
        ("unmasked_weight", 1.1),
        ("crop_jitter", -0.1),
        ("variants", 0),
        ("caption", {"drop": 1.1}),
        ("caption", {"drop_tags": 1}),
        ("caption", {"keep_tags": -1}),
        ("caption", {"variants": 0}),
        ("caption", "a cat"),
    ],
)
def test_what_cannot_be_meant_is_refused(setting: str, value: object) -> None:
    with pytest.raises(ValidationError, match=rf"\b{setting}\b"):
        source(**{setting: value})

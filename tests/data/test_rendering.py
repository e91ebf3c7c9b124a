from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from eri.config import CaptionRules
from eri.data.rendering import caption_of, has_unset_trigger, plain_caption, whole_captions

TAGS = "1girl, red hair, sky, smile, tree"
SYNTAX = "(a cat:1.2) {red|blue} [x] \\( a|b # {, }\n  two ,, lines "
NO_SYNTAX = ["", "a fox", SYNTAX, "[trigger] fox", "  kept  "]


def texts(captions: list[str] | str, count: int = 400, *, seed: int = 0, **rules: Any) -> list[str]:
    """The captions of the first samples of a run."""
    captions = [captions] if isinstance(captions, str) else captions
    made = CaptionRules(**rules)
    return [caption_of(captions, made, seed=seed, sample=sample) for sample in range(count)]


def plain(caption: str, *, regularization: bool = False, **rules: Any) -> str:
    made = CaptionRules(**rules)
    text = plain_caption([caption], made, regularization=regularization)
    sampled = caption_of([caption], made, seed=0, sample=0, regularization=regularization)
    assert text == sampled or made.wildcards or made.lines
    return text


# ------------------------------------------------------------------------- without chance


@pytest.mark.parametrize("caption", NO_SYNTAX, ids=range(len(NO_SYNTAX)))
def test_without_rules_a_caption_is_literal(caption: str) -> None:
    assert set(texts(caption, 20)) == {caption}
    assert plain(caption) == caption
    assert plain(caption, variants=3, keep_tags=2, weights=True) == caption


@pytest.mark.parametrize(
    ("prefix", "caption", "suffix", "text"),
    [
        ("photo of", "a fox", "", "photo of a fox"),
        ("photo of ", " a fox\n", " in snow", "photo of a fox in snow"),
        ("best,", "a fox", ", 4k", "best, a fox, 4k"),
        ("", "a fox", ".", "a fox."),
        ("photo", "", "4k", "photo 4k"),
        ("", "", ", 4k", ", 4k"),
        (" ", "", " ", ""),
    ],
)
def test_prefix_and_suffix(prefix: str, caption: str, suffix: str, text: str) -> None:
    assert plain(caption, prefix=prefix, suffix=suffix) == text


@pytest.mark.parametrize(
    ("caption", "rules", "text"),
    [
        ("a photo of [trigger] in snow", {}, "a photo of ohwx in snow"),
        ("[trigger] and [trigger]", {}, "ohwx and ohwx"),
        ("a photo", {}, "ohwx, a photo"),
        ("a photo", {"prefix": "best"}, "ohwx, best a photo"),
        ("a photo", {"prefix": "[trigger],"}, "ohwx, a photo"),
        ("a photo", {"suffix": "by [trigger]"}, "a photo by ohwx"),
        ("an OHWX, in snow", {}, "an OHWX, in snow"),
        ("ohwx's fox", {}, "ohwx's fox"),
        ("ohwxes", {}, "ohwx, ohwxes"),
        ("preohwx", {}, "ohwx, preohwx"),
        ("pre[trigger]post", {}, "preohwxpost"),
        ("", {}, "ohwx"),
        (" \n", {}, "ohwx"),
        ("c++ [trigger]", {"trigger": "c++, (x"}, "c++ c++, (x"),
        ("a b", {"trigger": "c++"}, "c++, a b"),
        ("a c++ b", {"trigger": "c++"}, "a c++ b"),
    ],
)
def test_the_trigger_stands_in_every_caption(caption: str, rules: dict, text: str) -> None:
    assert plain(caption, **{"trigger": "ohwx"} | rules) == text


def test_a_trigger_that_is_not_set_stays_and_can_be_told() -> None:
    assert plain("a [trigger] fox", prefix="[trigger]") == "[trigger] a [trigger] fox"
    assert has_unset_trigger(["a fox", "a [trigger]"], CaptionRules())
    assert has_unset_trigger(["a fox"], CaptionRules(suffix="[trigger]"))
    assert not has_unset_trigger(["a fox"], CaptionRules())
    assert not has_unset_trigger(["a [trigger]"], CaptionRules(trigger="ohwx"))


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ("a photo of [trigger] man", "a photo of man"),
        ("[trigger], a dog", "a dog"),
        ("[trigger] , a dog", "a dog"),
        ("a dog, [trigger], a cat", "a dog, a cat"),
        ("a dog, [trigger]", "a dog"),
        ("a dog [trigger].", "a dog."),
        ("[trigger]", ""),
        ("[trigger], [trigger]", ""),
        ("[trigger], a [trigger] dog, [trigger]", "a dog"),
        ("the [trigger]'s dog", "the 's dog"),
        ("no (a:1.2), {x|y}", "no (a:1.2), {x|y}"),
    ],
)
def test_regularization_has_no_trigger(caption: str, text: str) -> None:
    for trigger in ("ohwx", None):
        assert plain(caption, regularization=True, trigger=trigger) == text
    around = {"prefix": "[trigger],", "suffix": "by [trigger]"}
    assert plain(caption, regularization=True, **around) == f"{text} by".strip()


def test_a_plain_caption_takes_the_first_of_everything() -> None:
    rules = CaptionRules(
        lines=True, wildcards=True, shuffle_tags=True, drop_tags=0.9, drop=1.0, trigger="ohwx"
    )
    captions = ["\n b, {red|blue} {x}, a \n c", "d"]
    assert plain_caption(captions, rules) == "ohwx, b, red {x}, a"
    assert plain_caption(["\n \n"], rules) == "ohwx"


# ---------------------------------------------------------------------------- with chance


def test_the_share_of_dropped_captions() -> None:
    found = Counter(texts("a fox", 4000, drop=0.1, prefix="p", suffix="s", trigger="ohwx"))
    assert found == {"": 390, "ohwx, p a fox s": 3610}  # of 400 expected, 19 is the deviation
    assert set(texts("a fox", drop=1.0, trigger="ohwx")) == {""}
    assert set(texts("a fox", drop=0.0)) == {"a fox"}


def test_of_several_captions_each_is_seen_equally_often() -> None:
    found = Counter(texts(["a", "b", "c"], 3000))
    assert found.keys() == {"a", "b", "c"}
    assert all(abs(count - 1000) < 80 for count in found.values())


def test_with_lines_every_line_is_a_caption() -> None:
    captions = ["a fox\n\n  a red fox \r\n", "a tail"]
    assert set(texts(captions, lines=True)) == {"a fox", "a red fox", "a tail"}
    assert set(texts(captions)) == set(captions)
    assert set(texts("\n ", lines=True)) == {""}


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("{red|blue} fox", {"red fox", "blue fox"}),
        ("a{|n} x", {"a x", "an x"}),
        ("{a|{b|c} d}", {"a", "b d", "c d"}),
        ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}),
        ("{{a|b}}", {"{a}", "{b}"}),
        ("{a} {} | x", {"{a} {} | x"}),
        ("{a|b", {"{a|b"}),
        ("a} {b|c}", {"a} b", "a} c"}),
        ("{a|b {c|d}", {"{a|b c", "{a|b d"}),
        ("no choice", {"no choice"}),
    ],
)
def test_wildcards(caption: str, expected: set[str]) -> None:
    assert set(texts(caption, wildcards=True)) == expected
    assert plain(caption, wildcards=True) in expected
    assert set(texts(caption)) == {caption}


def test_the_options_of_a_wildcard_are_equally_frequent() -> None:
    found = Counter(texts("{a|b|c|d}", 4000, wildcards=True, variants=1000))
    assert all(abs(count - 1000) < 160 for count in found.values())  # 1000 draws, 4000 samples


def test_shuffled_tags_are_the_same_tags_in_every_order() -> None:
    found = set(texts("a, b ,c,,", 2000, shuffle_tags=True, variants=200))
    assert found == {"a, b, c", "a, c, b", "b, a, c", "b, c, a", "c, a, b", "c, b, a"}


def test_kept_tags_stay_where_they_are() -> None:
    found = texts(TAGS, shuffle_tags=True, drop_tags=0.5, keep_tags=2)
    assert all(text.startswith("1girl, red hair") for text in found)
    assert len(set(found)) > 5
    for keep in (5, 9):
        assert set(texts(TAGS, shuffle_tags=True, drop_tags=0.5, keep_tags=keep)) == {TAGS}


def test_prefix_trigger_and_suffix_are_neither_shuffled_nor_dropped() -> None:
    rules = {"prefix": "p, q,", "suffix": ", r, s", "trigger": "ohwx"}
    for text in texts(TAGS, shuffle_tags=True, drop_tags=0.5, **rules):
        assert text.startswith("ohwx, p, q, ")
        assert text.endswith(", r, s")
    # a trigger among the tags is dropped with them, and then put first
    found = texts("x, y, [trigger], z", shuffle_tags=True, drop_tags=0.5, trigger="o, p")
    assert {text.count("o, p") for text in found} == {1}
    assert {text.startswith("o, p") for text in found} == {True, False}


def test_the_share_of_dropped_tags() -> None:
    tags = ", ".join(f"t{number}" for number in range(20))
    found = texts(tags, 1000, drop_tags=0.3, variants=1000)
    kept = Counter(tag for text in found for tag in text.split(", "))
    # each tag is in 0.7 of the texts; the draws of equal variants are the same
    assert all(abs(count - 700) < 85 for count in kept.values())
    for text in found:  # in order, as nothing is shuffled
        numbers = [int(tag[1:]) for tag in text.split(", ")]
        assert all(first < second for first, second in pairwise(numbers))


def test_one_tag_always_stays() -> None:
    found = Counter(texts("a, b, c", 3000, drop_tags=0.99, variants=1000))
    assert found.keys() >= {"a", "b", "c"}
    assert "" not in found
    assert all(abs(found[tag] - 980) < 160 for tag in "abc")
    assert set(texts("one sentence without a comma", drop_tags=0.9)) == {
        "one sentence without a comma"
    }


def test_a_weight_is_not_torn_apart() -> None:
    caption = "(red hair, (blue, eyes):1.2), :(, smile, \\(a, b\\), c)"
    parts = {"(red hair, (blue, eyes):1.2)", ":(", "smile", "\\(a", "b\\)", "c)"}
    for text in texts(caption, shuffle_tags=True, weights=True):
        rest = text.replace("(red hair, (blue, eyes):1.2)", "W")
        assert set(rest.split(", ")) == parts - {"(red hair, (blue, eyes):1.2)"} | {"W"}
    torn = texts(caption, shuffle_tags=True)
    assert any("(red hair, (blue, eyes):1.2)" not in text for text in torn)


# ------------------------------------------------------------- what the texts are functions of

CHANCE = {"shuffle_tags": True, "drop_tags": 0.2, "wildcards": True}


@pytest.mark.parametrize("variants", [1, 4, 16])
def test_chance_makes_no_more_texts_than_stated(variants: int) -> None:
    captions = [TAGS.upper(), TAGS]
    found = set(texts(captions, 2000, variants=variants, drop=0.1, prefix="p", **CHANCE))
    assert "" in found
    upper = {text for text in found if text and text[2:] == text[2:].upper()}
    for some in (upper, found - upper - {""}):
        assert variants / 2 < len(some) <= variants


def test_another_seed_shows_the_same_texts_to_other_samples() -> None:
    first, second = (texts(TAGS, seed=seed, **CHANCE) for seed in (0, 1))
    assert first != second
    assert set(first) == set(second)
    assert first == texts(TAGS, **CHANCE)


def test_what_is_put_around_a_caption_changes_no_draw() -> None:
    around = texts(TAGS, prefix="p", suffix="s", trigger="ohwx", **CHANCE)
    assert around == [f"ohwx, p {text} s" for text in texts(TAGS, **CHANCE)]


def test_captions_are_varied_independently() -> None:
    orders = [texts(", ".join(tags), 30, shuffle_tags=True) for tags in ("abcdef", "ghijkl")]
    assert [text.translate(str.maketrans("ghijkl", "abcdef")) for text in orders[1]] != orders[0]


def test_a_sample_is_captioned_the_same_forever() -> None:
    """A resumed run, and the texts that a cache holds, count on these very words."""
    assert texts(f"{TAGS}, {{day|night}}", 6, drop=0.2, **CHANCE) == [
        "smile, night, tree, red hair, 1girl, sky",
        "red hair, tree, sky, 1girl, smile",
        "smile, red hair, tree, sky, 1girl",
        "day, tree, sky, smile",
        "",
        "red hair, 1girl, smile, sky, night",
    ]


def test_whole_captions_are_all_that_chance_can_show_before_it_leaves_things_out() -> None:
    rules = CaptionRules(
        lines=True, wildcards=True, shuffle_tags=True, drop_tags=0.5, trigger="sks", variants=6
    )
    captions = ["{red|dark blue} car, street", "one\ntwo, {a|b}"]
    whole = set(whole_captions(captions, rules))
    assert whole == {
        "sks, red car, street",
        "sks, dark blue car, street",
        "sks, one",
        "sks, two, a",
        "sks, two, b",
    }
    tags = [set(text.split(", ")) for text in whole]
    for sample in range(200):
        shown = set(caption_of(captions, rules, seed=1, sample=sample).split(", "))
        assert any(shown <= those for those in tags)
    assert whole_captions(["a", "b, c"], CaptionRules(shuffle_tags=True)) == ["a", "b, c"]

"""What a sample is captioned with: the texts beside an image, as the rules of a source change them.

Without rules a caption is literal: nothing in it is read as syntax. What chance decides is drawn in
two places. Which caption a sample has, whether it is dropped and which variant of it is shown, are
functions of the run's seed and the sample's number. What a variant looks like is a function of the
caption, the rules and the variant's number alone, so that all runs share a bounded number of texts
and each is encoded once.
"""

import hashlib
import re
from collections.abc import Sequence

import torch

from eri.config import CaptionRules
from eri.rng import generator

__all__ = ["caption_of", "has_unset_trigger", "plain_caption", "whole_captions"]

TRIGGER = "[trigger]"
NO_SPACE_BEFORE = tuple(",.;:!?")


def caption_of(
    captions: Sequence[str],
    rules: CaptionRules,
    *,
    seed: int,
    sample: int,
    regularization: bool = False,
) -> str:
    """The caption of a training sample.

    Args:
        captions: of the image, as they are written, at least one.
        rules: of the image's source.
        seed: the run's `train.seed`.
        sample: the number of the sample among all samples of the run.
        regularization: whether the source is one, which is told no trigger word.
    """
    bases = _bases(captions, rules)
    if not (rules.varies or rules.drop or len(bases) > 1):
        return _written(bases[0], rules, regularization)
    chance = generator(seed, "caption", sample=sample)
    dropped, which, variant = torch.rand(3, dtype=torch.float64, generator=chance).tolist()
    if dropped < rules.drop:
        return ""
    base = bases[int(which * len(bases))]
    number = int(variant * rules.variants) if rules.varies else None
    return _written(base, rules, regularization, number)


def plain_caption(
    captions: Sequence[str], rules: CaptionRules, *, regularization: bool = False
) -> str:
    """An image's first caption without any chance: nothing dropped or shuffled, first choices.

    For what shall not change from run to run: validation, previews, reports. The arguments are
    those of `caption_of`.
    """
    return _written(_bases(captions, rules)[0], rules, regularization)


def whole_captions(
    captions: Sequence[str], rules: CaptionRules, *, regularization: bool = False
) -> list[str]:
    """Every caption that an image can have, in order and with nothing left out.

    For how long captions may become. The arguments are those of `caption_of`.
    """
    whole = rules.model_copy(update={"shuffle_tags": False, "drop_tags": 0.0})
    variants = range(rules.variants) if rules.wildcards else (None,)
    return [
        _written(base, whole, regularization, variant)
        for base in _bases(captions, rules)
        for variant in variants
    ]


def has_unset_trigger(captions: Sequence[str], rules: CaptionRules) -> bool:
    """Whether `[trigger]` is written in captions, prefix or suffix, and no trigger word is set."""
    texts = (*captions, rules.prefix, rules.suffix)
    return not rules.trigger and any(TRIGGER in text for text in texts)


def _bases(captions: Sequence[str], rules: CaptionRules) -> Sequence[str]:
    """The captions that a sample may have one of."""
    if not rules.lines:
        return captions
    lines = [line.strip() for caption in captions for line in caption.splitlines()]
    return [line for line in lines if line] or [""]


def _written(
    base: str, rules: CaptionRules, regularization: bool, variant: int | None = None
) -> str:
    """A caption with all that the rules put to it.

    The trigger word comes last, so that no rule takes it apart; that of a regularization source
    goes first, so that the rules see the caption that is left.
    """
    prefix, suffix = rules.prefix, rules.suffix
    if regularization:
        base, prefix, suffix = map(_without_trigger, (base, prefix, suffix))
    text = _joined(prefix, _varied(base, rules, variant), suffix)
    if regularization or not rules.trigger:
        return text
    if TRIGGER in text or _names(text, rules.trigger):
        return text.replace(TRIGGER, rules.trigger)
    return f"{rules.trigger}, {text}" if text.strip() else rules.trigger


def _names(text: str, trigger: str) -> bool:
    """Whether a text has the trigger as a word; the text encoders know no capitals."""
    word = rf"(?<!\w){re.escape(trigger)}(?!\w)"
    return re.search(word, text, re.IGNORECASE) is not None


def _joined(prefix: str, text: str, suffix: str) -> str:
    """With one space between the parts that are not empty, none before punctuation."""
    if not prefix and not suffix:
        return text
    whole = ""
    for part in (prefix.strip(), text.strip(), suffix.strip()):
        space = " " if whole and part and not part.startswith(NO_SPACE_BEFORE) else ""
        whole += space + part
    return whole


def _without_trigger(text: str) -> str:
    """A text without `[trigger]`, nor the commas and spaces that only stood around it."""
    if TRIGGER not in text:
        return text
    found, *others = text.split(TRIGGER)
    for other in others:
        left, right = found.rstrip(), other.lstrip()
        space = " " if left != found or right != other else ""
        if right.startswith(",") and (not left or left.endswith(",")):
            right = right[1:].lstrip()
        if not right:
            left = left.removesuffix(",").rstrip()
        if not left or not right or right.startswith(NO_SPACE_BEFORE):
            space = ""
        found = left + space + right
    return found


def _varied(base: str, rules: CaptionRules, variant: int | None) -> str:
    """A variant of a caption, or, without a number, the caption with the first of all choices."""
    chance = None if variant is None else _chance(base, variant)
    text = _with_choices(base, chance) if rules.wildcards else base
    if chance is None or not (rules.shuffle_tags or rules.drop_tags):
        return text
    return _with_tags(text, rules, chance)


def _chance(base: str, variant: int) -> torch.Generator:
    """A caption takes the place of the run's seed: its variants are the same in every run."""
    digest = hashlib.blake2b(base.encode(errors="surrogatepass"), digest_size=16).digest()
    return generator(int.from_bytes(digest, "little"), "caption", sample=variant)


def _with_choices(text: str, chance: torch.Generator | None) -> str:
    """A text with one option of each `{a|b}`, which may stand in one another.

    Braces without a bar between them, and those without a partner, are text.
    """
    if "{" not in text:
        return text
    open_groups = [[""]]  # the options of each, of which the last is being read; first the text
    for part in re.split("([{|}])", text):
        inside = len(open_groups) > 1
        if part == "{":
            open_groups.append([""])
        elif part == "|" and inside:
            open_groups[-1].append("")
        elif part == "}" and inside:
            options = open_groups.pop()
            open_groups[-1][-1] += _one_of(options, chance)
        else:
            open_groups[-1][-1] += part
    while len(open_groups) > 1:
        options = open_groups.pop()
        open_groups[-1][-1] += "{" + "|".join(options)
    return open_groups[0][0]


def _one_of(options: list[str], chance: torch.Generator | None) -> str:
    if len(options) == 1:
        return f"{{{options[0]}}}"
    if chance is None:
        return options[0]
    return options[int(torch.randint(len(options), (), generator=chance))]


def _with_tags(text: str, rules: CaptionRules, chance: torch.Generator) -> str:
    """A text with the parts between its commas left out and reordered by chance.

    At least one part stays, so that only `drop` makes captions empty.
    """
    parts = [part.strip() for part in _between_commas(text, weighted=rules.weights)]
    parts = [part for part in parts if part]
    kept, others = parts[: rules.keep_tags], parts[rules.keep_tags :]
    if not others:
        return ", ".join(kept)
    draws = torch.rand(len(others), dtype=torch.float64, generator=chance).tolist()
    least = rules.drop_tags if kept else min(rules.drop_tags, max(draws))
    stay = [part for part, draw in zip(others, draws, strict=True) if draw >= least]
    if rules.shuffle_tags:
        stay = [stay[index] for index in torch.randperm(len(stay), generator=chance).tolist()]
    return ", ".join([*kept, *stay])


def _between_commas(text: str, *, weighted: bool) -> list[str]:
    """The parts between commas; where parentheses are weights, what is in them is one part."""
    if not weighted or "(" not in text:
        return text.split(",")
    ends, opened = {}, []
    for match in re.finditer(r"\\[()]|[()]", text):
        if match[0] == "(":
            opened.append(match.start())
        elif match[0] == ")" and opened:
            ends[opened.pop()] = match.start()
    parts, start, inside = [], 0, -1
    for match in re.finditer("[(,]", text):
        place = match.start()
        if place < inside:
            continue
        if match[0] == "(":
            inside = ends.get(place, inside)
        else:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]

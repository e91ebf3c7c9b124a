"""Weights in prompts: the syntax, and what they do to states, beside the rule as published."""

import random
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eri.models import load_text
from eri.models.text import TextEncoder
from eri.models.weights import apply, parse
from eri.models.windows import Joined

MORE, MOST = 1.1, 1.1 * 1.1
PARSED = [
    ("", []),
    ("a cat", [("a cat", 1.0)]),
    ("(a cat)", [("a cat", MORE)]),
    ("a ((cat)) b", [("a ", 1.0), ("cat", MOST), (" b", 1.0)]),
    ("(a cat:1.2)", [("a cat", 1.2)]),
    ("(a cat: .5 )", [("a cat", 0.5)]),
    ("(a:-1)(b:0)(c:2.)", [("a", -1.0), ("b", 0.0), ("c", 2.0)]),
    ("(a:+1e-1)", [("a", 0.1)]),
    # a number is the weight, whatever is around it; without one, 1.1 times what is around it
    ("((foo):1.1)", [("foo", MOST)]),
    ("((foo:1.1))", [("foo", 1.1)]),
    ("((foo:1.0):0.0)", [("foo", 1.0)]),
    ("foo (((l (cat:6) a:10))) z", [("foo ", 1), ("l ", 10), ("cat", 6), (" a", 10), (" z", 1)]),
    # no weights
    ("at 12:30, a:b", [("at 12:30, a:b", 1.0)]),
    ("[a cat] {a|b} <x:1>", [("[a cat] {a|b} <x:1>", 1.0)]),
    (r"a \(b:1.2\)", [("a (b:1.2)", 1.0)]),
    (r"(\(:1.2)", [("(", 1.2)]),
    (r"a \ b \[ \\", [(r"a \ b \[ \\", 1.0)]),
    # the last colon, with a number behind and something before it
    ("(a:b:1.2)", [("a:b", 1.2)]),
    ("(a:b)", [("a:b", MORE)]),
    ("(a:)", [("a:", MORE)]),
    ("(:1.2)", [(":1.2", MORE)]),
    ("(a (b):1.5)", [("a ", 1.5), ("b", 1.5 * MORE)]),
    ("((b):1.5)", [("b", 1.5 * MORE)]),
    (r"(a:1.2\))", [("a:1.2)", MORE)]),
    ("(a:nan)(b:inf)(c:1_0)(d:1e999)", [(f"{text}", MORE) for text in
        ("a:nan", "b:inf", "c:1_0", "d:1e999")]),
    # without a partner, text
    ("a (b", [("a (b", 1.0)]),
    ("a) b :)", [("a) b :)", 1.0)]),
    ("a) (b:1.2)", [("a) ", 1.0), ("b", 1.2)]),
    ("a (b (c:1.2)", [("a (b ", 1.0), ("c", 1.2)]),
    # nothing in them
    ("a () b", [("a ", 1.0), (" b", 1.0)]),
    ("(foo)(bar)", [("foo", MORE), ("bar", MORE)]),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "parts"), PARSED, ids=range(len(PARSED)))
def test_parse(prompt: str, parts: list[tuple[str, float]]) -> None:
    assert parse(prompt) == parts


def by_rule(text: str, outer: float = 1.0) -> list[tuple[str, float]]:
    """The published rule by recursion over the outermost parentheses of a balanced text."""
    found, depth, start = [], 0, 0
    for place, sign in enumerate(text):
        if sign == "(":
            if depth == 0:
                found.append((text[start:place], outer))
                start = place + 1
            depth += 1
        elif sign == ")":
            depth -= 1
            if depth == 0:
                found += by_rule(*weight_of(text[start:place], outer))
                start = place + 1
    return [part for part in [*found, (text[start:], outer)] if part[0]]


def weight_of(group: str, outer: float) -> tuple[str, float]:
    match = re.fullmatch(r"(.+):\s*([+-]?[\d.]+)\s*", group, re.DOTALL)
    return (match[1], float(match[2])) if match else (group, outer * 1.1)


def random_prompt(chance: random.Random, depth: int = 0) -> str:
    def one() -> str:
        if depth < 5 and chance.random() < 0.4:
            end = chance.choice(["", "", ":1.2", ": 0.5", ":", ":x", ":-1"])
            return f"({random_prompt(chance, depth + 1)}{end})"
        return chance.choice(["a", " b", "c ", ", ", ":", "[x]", "7"])

    return "".join(one() for _ in range(chance.randrange(4)))


def test_random_prompts_are_parsed_by_the_rule() -> None:
    chance = random.Random(0)
    prompts = {random_prompt(chance) for _ in range(4000)}
    nested = [prompt for prompt in prompts if prompt.count("((")]
    assert len(nested) > 300
    for prompt in prompts:
        assert parse(prompt) == by_rule(prompt), prompt


def test_a_prompt_may_be_nested_as_deep_as_a_caption_is_long() -> None:
    ((text, weight),) = parse("(" * 30_000 + "a:1.5" + ")" * 30_000)
    assert (text, weight) == ("a", 1.5)
    assert parse("(" * 60_000) == [("(" * 60_000, 1.0)]


def test_states_lie_on_the_line_through_the_empty_prompts() -> None:
    torch.manual_seed(0)
    states, empty = torch.randn(2, 1, 3, 4), torch.randn(1, 1, 3, 4)
    weights = torch.tensor([[[1.0, 0.0, 2.0]], [[1.0, 1.0, -1.0]]])
    found = apply(states, empty, weights)
    assert torch.equal(found[0, 0, 0], states[0, 0, 0])
    assert torch.equal(found[1, 0, 1], states[1, 0, 1])
    torch.testing.assert_close(found[0, 0, 1], empty[0, 0, 1])
    torch.testing.assert_close(found[0, 0, 2], 2 * states[0, 0, 2] - empty[0, 0, 2])
    torch.testing.assert_close(found[1, 0, 2], 2 * empty[0, 0, 2] - states[1, 0, 2])


def test_half_precision_is_weighted_in_float32() -> None:
    torch.manual_seed(0)
    states, empty = torch.randn(1, 1, 2, 64).bfloat16(), torch.randn(1, 1, 2, 64).bfloat16()
    found = apply(states, empty, torch.tensor([[[1.0, 1.3]]]))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[:, :, 0], states[:, :, 0])
    exact = (empty.double() + (states.double() - empty.double()) * 1.3)[:, :, 1]
    half = (empty + (states - empty) * 1.3)[:, :, 1]
    worst = [float(((it.double() - exact) / exact).abs().max()) for it in (found[:, :, 1], half)]
    assert worst[0] <= 2**-8 < worst[1]  # of bfloat16, half a unit in the last place


# ---------------------------------------------------------------- states of whole encoders

WEIGHTED = "a (red fox:1.4) in ((deep snow)), (blue:0.3) \\(sky\\) [at] 12:30"
PLAIN = "a red fox in deep snow, blue (sky) [at] 12:30"
LONG = "a long (winter night:1.3), " + "fox " * 66 + "(one two three four five:0.7) end"


@pytest.fixture(scope="module", params=["sd15_real", "sd21", "sdxl"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def text(folder: Path) -> TextEncoder:
    return load_text(folder)


def windows_by_rule(tokenizer, prompt: str, pad: int) -> list[list[tuple[int, float]]]:
    """As ComfyUI fills windows: parts of fewer than 8 tokens are not divided."""
    prompt = prompt.replace("\\(", "\0").replace("\\)", "\1")
    windows: list[list[tuple[int, float]]] = [[]]
    for piece, weight in by_rule(prompt):
        words = piece.replace("\0", "(").replace("\1", ")")
        ids = tokenizer(words, add_special_tokens=False).input_ids
        pairs = [(token, weight) for token in ids]
        if len(pairs) < 8 and len(windows[-1]) + len(pairs) > 75:
            windows.append([])
        for pair in pairs:
            if len(windows[-1]) == 75:
                windows.append([])
            windows[-1].append(pair)
    return [
        [(49406, 1.0), *pairs, (49407, 1.0), *[(pad, 1.0)] * (75 - len(pairs))] for pairs in windows
    ]


def states_by_rule(folder: Path, prompt: str) -> tuple[Tensor, list[int]]:
    """Weighted states `[1, T, C]` with transformers' own models, and the tokens per window."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    classes = {name: kind for name, kind in classes.items() if (folder / name).exists()}
    channels, sizes = [], []
    for name, kind in classes.items():
        model = kind.from_pretrained(folder / name)
        tokenizer = CLIPTokenizer.from_pretrained(
            folder / name.replace("text_encoder", "tokenizer")
        )
        windows = windows_by_rule(tokenizer, prompt, tokenizer.pad_token_id)
        nothing = [49406, 49407, *[tokenizer.pad_token_id] * 75]
        ids = torch.tensor([*([token for token, _ in pairs] for pairs in windows), nothing])
        with torch.no_grad():
            output = model(ids, output_hidden_states=True)
        states = output.last_hidden_state if len(classes) == 1 else output.hidden_states[-2]
        rows = []
        for number, pairs in enumerate(windows):
            for place, (_, weight) in enumerate(pairs):
                empty = states[-1, place]
                rows.append((states[number, place] - empty) * weight + empty)
        channels.append(torch.stack(rows))
        sizes = [len(pairs) for pairs in windows]
    return torch.cat(channels, dim=-1)[None], sizes


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def test_weighted_states_are_those_of_the_rule(folder: Path, text: TextEncoder) -> None:
    found, pooled = text.encode([WEIGHTED], weighted=True)
    assert difference(found, states_by_rule(folder, WEIGHTED)[0]) < 1e-5
    plain, pool = text.encode([PLAIN])
    assert difference(found, plain) > 1e-2  # the weights do something
    if pooled is not None and pool is not None:
        assert torch.equal(pooled, pool)  # not to the pooled text


def test_long_prompts_are_divided_as_by_the_rule(folder: Path, text: TextEncoder) -> None:
    expected, sizes = states_by_rule(folder, LONG)
    assert text.words.windows_needed([LONG], weighted=True) == len(sizes) == 2
    found = text.encode([LONG], windows=2, weighted=True)[0]
    assert difference(found, expected) < 1e-5
    # 71 tokens in the first window, as the five with a weight stay together
    assert [prompt.shares for prompt in text.words.readers[0].read([LONG], True)] == [[71, 6]]
    assert text.words.tokens_lost(LONG, windows=1, weighted=True) == 6
    assert text.words.tokens_lost(LONG, windows=2, weighted=True) == 0


def test_a_weight_of_one_changes_no_bit(text: TextEncoder) -> None:
    prompts = ["a [red] fox at 12:30 :)", "", "a ([red] fox", "fox " * 90]
    alone = text.encode([PLAIN, *prompts], windows=2)
    ones = "a (red fox:1.0) in ((deep:1) snow:1), blue \\(sky\\) [at] 12:30"
    assert same(text.encode([ones, *prompts], windows=2, weighted=True), alone)
    # beside one with weights, too
    states, pooled = text.encode([*prompts, WEIGHTED], windows=2, weighted=True)
    beside = text.encode([*prompts, PLAIN], windows=2)
    assert torch.equal(states[:-1], beside[0][:-1])
    assert not torch.equal(states[-1], beside[0][-1])
    assert pooled is beside[1] or torch.equal(pooled, beside[1])


def same(first: tuple[Tensor, Tensor | None], second: tuple[Tensor, Tensor | None]) -> bool:
    pools = first[1] is second[1] or torch.equal(*(pool for _, pool in (first, second)))
    return torch.equal(first[0], second[0]) and pools


def test_each_prompt_may_say_whether_it_has_weights(text: TextEncoder) -> None:
    literal, weighted = (text.encode([WEIGHTED], weighted=flag)[0] for flag in (False, True))
    assert difference(literal, weighted) > 1e-2
    found = text.encode([WEIGHTED, WEIGHTED], weighted=[False, True])[0]
    torch.testing.assert_close(found, torch.cat([literal, weighted]))
    assert text.words.windows_needed(["(a) " * 40], weighted=False) == 2
    assert text.words.windows_needed(["(a) " * 40], weighted=True) == 1
    assert text.words.tokens_lost("(a) " * 40) == 45
    assert text.words.tokens_lost("(a) " * 40, weighted=True) == 0
    with pytest.raises(ValueError, match="shorter"):
        text.encode([WEIGHTED, WEIGHTED], weighted=[True])


@pytest.mark.parametrize("joined", ["ui", "kohya"])
def test_weights_stand_where_their_tokens_are(sd15: Path, joined: Joined) -> None:
    """A token of weight 0 leaves the state of the empty prompt, all others their own."""
    text = load_text(sd15, joined=joined)
    before, inner = "a " * 80, "b " * 20
    prompt = f"{before}({inner}:0){before}"
    windows = text.words.windows_needed([prompt], weighted=True)
    found = text.encode([prompt], windows, weighted=True)[0][0]
    plain = text.encode([before + inner + before], windows)[0][0]
    empty = text.encode([""], windows)[0][0]
    first = 77 + 1 + 5 if joined == "ui" else 1 + 80  # 75 in the first window, and the start
    changed = torch.arange(len(found))[(found != plain).any(dim=1)].tolist()
    assert changed == list(range(first, first + 20))
    torch.testing.assert_close(found[changed], empty[changed])

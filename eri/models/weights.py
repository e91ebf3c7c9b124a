"""Weights in prompts, as ComfyUI reads them.

    (a cat)      1.1 times the weight around it
    (a cat:1.3)  the weight 1.3, whatever is around it
    ((a cat))    1.21: parentheses stand in one another
    \\( \\)        parentheses that are text

Everything else is text, square brackets too, of which A1111 makes smaller weights; there a number
multiplies what is around it, too. A parenthesis without its partner is text. (After one, ComfyUI
reads some that do have partners as text as well.)

Source: the functions `token_weights` and `parse_parentheses` of ComfyUI's sd1_clip.py.
"""

import math
import re

import torch
from torch import Tensor

__all__ = ["apply", "parse"]

MORE = 1.1
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.ASCII | re.IGNORECASE)
LITERAL = {r"\(": "(", r"\)": ")"}


def parse(prompt: str) -> list[tuple[str, float]]:
    """A prompt as pieces of text, each with its weight.

    Pieces are read one by one: no word goes from one into the next. A prompt without parentheses
    is one piece; an empty one has none.
    """
    parts = re.split(r"(\\[()]|[()])", prompt)  # by turns text, which may be empty, and a mark
    groups = _groups(parts)
    numbers = {start: _take_number(parts, start, end) for start, end in groups.items()}
    ends = set(groups.values())
    found: list[tuple[str, float]] = []
    weights, text = [1.0], ""
    for index, part in enumerate(parts):
        if index not in groups and index not in ends:
            text += LITERAL.get(part, part)
            continue
        found.append((text, weights[-1]))
        text = ""
        if index in ends:
            weights.pop()
        else:
            number = numbers[index]
            weights.append(weights[-1] * MORE if number is None else number)
    return [(text, weight) for text, weight in [*found, (text, 1.0)] if text]


def apply(states: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """Weights on the states of a prompt: `empty + (state - empty) * weight`, in float32.

    As ComfyUI does. A1111 multiplies the state itself and scales all of them so that their mean
    is what it was. A state of weight 1 is left as it is, to the last bit.

    Args:
        states: `[B, n, L, C]`.
        empty: of the empty prompt at the same places, `[1, n, L, C]`.
        weights: `[B, n, L]`, float32.

    Returns:
        `[B, n, L, C]`, of the states' type.
    """
    base, factors = empty.float(), weights[..., None]
    weighted = base + (states.float() - base) * factors
    return torch.where(factors == 1, states, weighted.to(states.dtype))


def _groups(parts: list[str]) -> dict[int, int]:
    """Where the parentheses that have a partner open and close."""
    found: dict[int, int] = {}
    opened = []
    for index, part in enumerate(parts):
        if part == "(":
            opened.append(index)
        elif part == ")" and opened:
            found[opened.pop()] = index
    return found


def _take_number(parts: list[str], start: int, end: int) -> float | None:
    """The number behind the last colon in parentheses, which is taken out, or None.

    What it weighs must stand before it, if only a space.
    """
    text, colon, number = parts[end - 1].rpartition(":")
    if not colon or not (text or end - 1 > start + 1) or not NUMBER.fullmatch(number):
        return None
    weight = float(number)
    if not math.isfinite(weight):
        return None
    parts[end - 1] = text
    return weight

"""Prompts longer than one window of a text encoder: cut into windows, and the states joined again.

A CLIP text encoder reads 77 tokens: a start, 75 of the prompt and an end. Longer prompts are read
in windows. Programs join the states in two ways:

- `ui`, of A1111 and ComfyUI: every window keeps its start and end, 77·n states.
- `kohya`, of kohya's scripts: the start of the first window, the inner states of every window and
  the last state of the last, 75·n + 2 states.

One window is the same in both.

A text is cut wherever a window is full. A prompt whose parts have weights is cut in `ui` as ComfyUI
does: a part of fewer than eight tokens goes whole into the next window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, TypeVar

import torch
from torch import Tensor

__all__ = ["MOST_WINDOWS", "Joined", "Marks", "cut", "join", "shares", "spread"]

Item = TypeVar("Item")
Joined = Literal["ui", "kohya"]
MOST_WINDOWS = 3
DIVIDED = 8  # tokens from which on a part of a prompt is divided


@dataclass(frozen=True)
class Marks:
    """Ids of the tokens that stand around a prompt's own.

    Attributes:
        start: before them.
        end: behind them.
        pad: fills a window up.
    """

    start: int
    end: int
    pad: int


def shares(parts: Sequence[int], *, length: int, joined: Joined) -> list[int]:
    """How many of a prompt's own tokens each window gets, at least one window.

    Args:
        parts: tokens of each part of the prompt; without weights it has one.
        length: of a window, with start and end.
        joined: how the states will be joined.
    """
    inner = length - 2
    found = [0]
    for size in parts if joined == "ui" else [sum(parts)]:
        left, divided = size, size >= DIVIDED or size > inner
        while left > (room := inner - found[-1]):
            if divided:
                found[-1] = inner
                left -= room
            found.append(0)
        found[-1] += left
    return found


def cut(
    tokens: Sequence[int],
    shares: Sequence[int],
    marks: Marks,
    *,
    length: int,
    windows: int,
    joined: Joined,
) -> list[list[int]]:
    """A prompt's own tokens as windows, each as long as `length`; what does not fit is cut off.

    Args:
        tokens: without start and end.
        shares: of the windows, from `shares`.
        marks: of the tokenizer.
        length: of a window, with start and end.
        windows: how many.
        joined: how the states will be joined.
    """
    inner = length - 2
    if joined == "kohya" and windows > 1:
        tokens = list(tokens[: windows * inner])
        return _cut_as_kohya(tokens, marks, inner=inner, windows=windows)
    return [
        [marks.start, *piece, marks.end, *[marks.pad] * (inner - len(piece))]
        for piece in _pieces(tokens, shares, windows)
    ]


def spread(
    weights: Sequence[float], shares: Sequence[int], *, length: int, windows: int
) -> list[list[float]]:
    """The weights of a prompt's own tokens where `cut` puts the tokens; 1 for all others.

    Both ways to join put a window's tokens behind its first one.
    """
    return [
        [1.0, *piece, *[1.0] * (length - 1 - len(piece))]
        for piece in _pieces(weights, shares, windows)
    ]


def join(states: Tensor, *, joined: Joined) -> Tensor:
    """The states of a prompt's windows as those of one text.

    Args:
        states: `[B, n, L, C]`, n windows of L.
        joined: see above.

    Returns:
        `[B, n·L, C]`, or `[B, n·(L-2) + 2, C]` as kohya does.
    """
    if joined == "ui" or states.shape[1] == 1:
        return states.flatten(1, 2)
    inner = states[:, :, 1:-1].flatten(1, 2)
    return torch.cat([states[:, 0, :1], inner, states[:, -1, -1:]], dim=1)


def _pieces(values: Sequence[Item], shares: Sequence[int], windows: int) -> list[Sequence[Item]]:
    """What each of so many windows gets of a prompt's values."""
    ends = list(accumulate([*shares, *[0] * windows][:windows], initial=0))
    return [values[start:end] for start, end in pairwise(ends)]


def _cut_as_kohya(tokens: list[int], marks: Marks, *, inner: int, windows: int) -> list[list[int]]:
    """One long text with one end, of which every window gets a part, the start and the last token.

    Where a tokenizer's end does not fill windows up, a window that is full gets an end, and one
    that begins with filling begins with an end.
    """
    text = [*tokens, marks.end, *[marks.pad] * (windows * inner - len(tokens))]
    found = []
    for start in range(0, windows * inner, inner):
        part, last = text[start : start + inner], text[-1]
        if marks.pad != marks.end:
            last = last if part[-1] in {marks.end, marks.pad} else marks.end
            part[0] = marks.end if part[0] == marks.pad else part[0]
        found.append([marks.start, *part, last])
    return found

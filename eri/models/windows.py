"""Prompts longer than one window of a text encoder: cut into windows, and the states joined again.

A CLIP text encoder reads 77 tokens: a start, 75 of the prompt and an end. Longer prompts are read
in windows. Programs join the states in two ways:

- `ui`, of A1111 and ComfyUI: every window keeps its start and end, 77·n states.
- `kohya`, of kohya's scripts: the start of the first window, the inner states of every window and
  the last state of the last, 75·n + 2 states.

One window is the same in both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["MOST_WINDOWS", "Joined", "Marks", "cut", "join", "needed"]

Joined = Literal["ui", "kohya"]
MOST_WINDOWS = 3


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


def needed(tokens: int, length: int) -> int:
    """The fewest windows of `length` that hold a prompt's own tokens, at most three."""
    return min(max(-(-tokens // (length - 2)), 1), MOST_WINDOWS)


def cut(
    tokens: Sequence[int], marks: Marks, *, length: int, windows: int, joined: Joined
) -> list[list[int]]:
    """A prompt's own tokens as windows, each as long as `length`; what does not fit is cut off.

    Args:
        tokens: without start and end.
        marks: of the tokenizer.
        length: of a window, with start and end.
        windows: how many.
        joined: how the states will be joined.
    """
    inner = length - 2
    tokens = list(tokens[: windows * inner])
    if joined == "kohya" and windows > 1:
        return _cut_as_kohya(tokens, marks, inner=inner, windows=windows)
    pieces = (tokens[start : start + inner] for start in range(0, windows * inner, inner))
    return [
        [marks.start, *piece, marks.end, *[marks.pad] * (inner - len(piece))] for piece in pieces
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

"""Foreign text made fit to print: a file may hold anything, a terminal may not be shown it.

A file name can carry escape sequences that rewrite the screen, bidirectional overrides that show
another name, or bytes that are no text at all. What passes through `printable` is one line of
visible characters.
"""

from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import TypeVar

__all__ = ["first_few", "printable"]

Item = TypeVar("Item")


def printable(text: str | PurePath, limit: int = 200) -> str:
    r"""`text` with every invisible character as an escape like `\x1b`, cut to `limit` characters.

    Args:
        text: any string or path, also a name that is not UTF-8 (lone surrogates).
        limit: the most characters shown; what is left out is counted as `…(+n)`.
    """
    text = str(text)
    shown, kept = "", 0
    for character in text[:limit]:
        visible = _visible(character)
        if len(shown) + len(visible) > limit:
            break
        shown += visible
        kept += 1
    left_out = len(text) - kept
    return f"{shown}…(+{left_out})" if left_out else shown


def first_few(
    items: Sequence[Item], show: Callable[[Item], str] = printable, *, shown: int = 5
) -> list[str]:
    """The first of some items, a line each, and a line that counts the rest.

    Args:
        items: what a message is about.
        show: one of them as a line that is fit to print.
        shown: the most items shown.
    """
    more = [f"and {len(items) - shown} more"] if len(items) > shown else []
    return [*map(show, items[:shown]), *more]


def _visible(character: str) -> str:
    # not controls, formatting, lone surrogates, separators, nor what no standard gives a shape
    if character.isprintable():
        return character
    code = ord(character)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"

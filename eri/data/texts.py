"""Text states computed once: each text by its own characters and what read them.

A caption that is edited, or read by another encoder, in more windows or from another layer, is
another entry; a caption that many images share is one.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from eri.data.entries import key, read_entry, sweep_unfinished, write_entry
from eri.data.items import Progress
from eri.errors import DataError, NonFiniteError
from eri.printable import printable

__all__ = ["EncodeText", "TextStates", "Texts", "cache_texts", "missing_texts"]

READING = 1
"""Raised when a text comes to other states for the same encoder: how it is cut into windows, how
its weights are applied."""

KEPT = 64
"""Text states that a `Texts` remembers; SDXL's for a text of one window take 0.6 MB."""

SHOWN = 80  # characters of a text in a message


class TextStates(NamedTuple):
    """What a text encoder makes of a text, on the CPU and in the encoder's type; read only."""

    context: Tensor  # [S, K]
    pooled: Tensor | None = None  # [P]; None where the model has none


EncodeText = Callable[[str], TextStates]


class Texts:
    """The states of texts that are in the cache, read when they are asked for.

    Pickled, it is the name of the encoder alone.

    Args:
        encoder: see `cache_texts`.
    """

    def __init__(self, encoder: str) -> None:
        self.encoder = encoder
        self._states = lru_cache(maxsize=KEPT)(self._read)

    def __reduce__(self) -> tuple[type["Texts"], tuple[str]]:
        return Texts, (self.encoder,)

    def __getitem__(self, text: str) -> TextStates:
        """The states of a text that `cache_texts` was given.

        Raises:
            DataError: they are not there, or are damaged.
        """
        return self._states(text)

    def _read(self, text: str) -> TextStates:
        path = _entry(text, self.encoder)
        states = _states_in(path)
        if states is None:
            raise DataError(
                f"the cached states of the text '{printable(text, SHOWN)}' are missing or damaged",
                where=printable(path),
                hint="run the same command again; they are computed anew",
            )
        return states


def cache_texts(
    texts: Sequence[str],
    encode: EncodeText,
    *,
    encoder: str,
    progress: Progress | None = None,
) -> Texts:
    """Encodes the texts that the cache does not hold yet, one at a time.

    An entry so never depends on what else was missing.

    Args:
        texts: any; equal ones count once.
        encode: a text to its states.
        encoder: all that the states depend on beside the text: the hash of the weights, the type
            they compute in, windows, skipped layers.
        progress: called as texts are found or encoded.

    Raises:
        NonFiniteError: a text has a NaN or an infinity in its states; names the text.
        DiskError: the cache cannot be written.
    """
    sweep_unfinished("text")
    distinct = tuple(dict.fromkeys(texts))
    for done, text in enumerate(distinct, start=1):
        path = _entry(text, encoder)
        if _states_in(path) is None:
            states = _finite(encode(text), text)
            write_entry(path, {n: part for n, part in states._asdict().items() if part is not None})
        if progress is not None:
            progress(done, len(distinct))
    return Texts(encoder)


def missing_texts(texts: Sequence[str], encoder: str) -> list[str]:
    """Which texts have no entry yet, each once; what the entries hold is not looked at."""
    return [text for text in dict.fromkeys(texts) if not _entry(text, encoder).exists()]


def _entry(text: str, encoder: str) -> Path:
    return key("text", text, encoder, READING)


def _states_in(path: Path) -> TextStates | None:
    found = read_entry(path)
    if found is None or not {"context"} <= found.keys() <= {"context", "pooled"}:
        return None
    return TextStates(**found)


def _finite(states: TextStates, text: str) -> TextStates:
    parts = [part for part in states if part is not None]
    if not all(part.isfinite().all() for part in parts):
        raise NonFiniteError(
            "the text encoder gives a NaN or an infinity for a text",
            where=f"'{printable(text, SHOWN)}'",
            hint="compute it in fp32; if it is that already, the text encoder is damaged",
        )
    return states

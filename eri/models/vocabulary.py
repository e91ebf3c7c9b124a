"""CLIP's vocabulary, which comes with eri: a checkpoint of one file carries no tokenizer.

Where it comes from, and its licence: `eri/models/clip/README.md`.
"""

import gzip
import importlib.resources
from dataclasses import dataclass

__all__ = ["END", "START", "Vocabulary", "clip_vocabulary"]

START = "<|startoftext|>"  # 49406
END = "<|endoftext|>"  # 49407


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and merges of a byte-pair encoding.

    Attributes:
        ids: the id of each token; `</w>` marks the end of a word.
        merges: pairs that become one token, the most frequent first.
    """

    ids: dict[str, int]
    merges: list[tuple[str, str]]


def clip_vocabulary() -> Vocabulary:
    """The 49,408 tokens of OpenAI's CLIP and the 48,894 merges that they come from."""
    packed = importlib.resources.files("eri") / "models" / "clip" / "merges.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode("utf-8").splitlines()[1:]
    merges = [(first, second) for first, second in (line.split(" ") for line in lines)]
    symbols = _byte_symbols()
    tokens = [
        *symbols,
        *(f"{symbol}</w>" for symbol in symbols),
        *(first + second for first, second in merges),
        START,
        END,
    ]
    return Vocabulary({token: index for index, token in enumerate(tokens)}, merges)


def _byte_symbols() -> list[str]:
    """A visible character for each byte, in CLIP's order: those that print come first."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [*map(chr, visible), *(chr(256 + n) for n in range(256 - len(visible)))]

"""How a model's text encoders read prompts, known without their weights.

Token by token, in windows; and which states of them a model was trained with, counted from the last
layer's, which is 1:

    SD1.x   1, or `clip_skip`, after the final layer norm
    SD2.x   the last of the layers that it uses, after the final layer norm
    SDXL    2 of both encoders, without the norm, side by side; and of the second encoder the last
            state of the end token, after the norm, projected: the pooled text

Source: the pipelines of diffusers, and Podell et al., arXiv 2307.01952, section 2.1.

A run counts the tokens of its captions each time that it starts, and mostly finds their states in
the cache. So of transformers only the tokenizer is imported here: its models take seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eri.errors import ConfigError, ModelError
from eri.formats.checkpoint import text_parts
from eri.formats.parts import Pieces, TextPart
from eri.formats.text_names import PROJECTION, text_shapes
from eri.models.load import require_shapes
from eri.models.vocabulary import END, START, clip_vocabulary
from eri.models.weights import parse
from eri.models.windows import MOST_WINDOWS, Joined, Marks, cut, shares
from eri.printable import printable

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

__all__ = ["Prompt", "PromptReader", "States", "Words", "load_words", "used_pieces", "words_of"]

OWN_STATES = "SD2.x and SDXL are trained with the last states but one of their text encoders"


@dataclass(frozen=True)
class States:
    """Which hidden states of the encoders are used.

    Attributes:
        depth: counted from the last layer's, which is 1.
        normed: whether they go through the final layer norm.
        note: a sentence for people about a `clip_skip` that changes nothing.
    """

    depth: int
    normed: bool
    note: str | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt as an encoder reads it.

    Attributes:
        tokens: its own, without start and end.
        weights: of each; 1 where nothing is said.
        shares: how many of them each window gets; see `eri.models.windows`.
    """

    tokens: list[int]
    weights: list[float]
    shares: list[int]


@dataclass(frozen=True)
class PromptReader:
    """How one encoder reads prompts.

    Attributes:
        tokenizer: its own.
        marks: of that tokenizer.
        length: L, the tokens of a window, start and end included.
        joined: how the windows of a long prompt are joined; see `eri.models.windows`.
    """

    tokenizer: CLIPTokenizer
    marks: Marks
    length: int
    joined: Joined

    def read(self, prompts: Sequence[str], weighted: bool | Sequence[bool]) -> list[Prompt]:
        """Prompts as tokens with their weights; all are tokenized at once.

        Args:
            prompts: any number.
            weighted: whether `(a cat:1.2)` is a weight; of all prompts, or of each.
        """
        flags = [weighted] * len(prompts) if isinstance(weighted, bool) else weighted
        parsed = [
            parse(prompt) if flag else [(prompt, 1.0)]
            for prompt, flag in zip(prompts, flags, strict=True)
        ]
        tokens = iter(self.tokens([text for parts in parsed for text, _ in parts]))
        return [self._prompt([(next(tokens), weight) for _, weight in parts]) for parts in parsed]

    def tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """Each prompt's own tokens, without start and end."""
        if not prompts:
            return []  # of which transformers makes an IndexError
        # verbose=False: the tokenizer's warning of long prompts is ours to give
        found = self.tokenizer(list(prompts), add_special_tokens=False, verbose=False)
        return found.input_ids

    def cut(self, prompt: Prompt, windows: int) -> list[list[int]]:
        """The L ids of each of a prompt's windows."""
        return cut(
            prompt.tokens,
            prompt.shares,
            self.marks,
            length=self.length,
            windows=windows,
            joined=self.joined,
        )

    def _prompt(self, parts: Sequence[tuple[list[int], float]]) -> Prompt:
        """A prompt of parts: the tokens of each, and their weight."""
        sizes = [len(tokens) for tokens, _ in parts]
        return Prompt(
            tokens=[token for tokens, _ in parts for token in tokens],
            weights=[weight for tokens, weight in parts for _ in tokens],
            shares=shares(sizes, length=self.length, joined=self.joined),
        )


class Words:
    """How the text encoders of a model, one or SDXL's two, read prompts.

    Args:
        readers: of each encoder, in the order of their channels; all join windows in one way.
        states: those that are used.
    """

    def __init__(self, readers: Sequence[PromptReader], states: States) -> None:
        self.readers = tuple(readers)
        self.states = states
        self.joined: Joined = readers[0].joined
        self.tokens = readers[0].length
        """L, the tokens of a window, start and end included."""

    def windows_needed(
        self, prompts: Sequence[str], weighted: bool | Sequence[bool] = False
    ) -> int:
        """The fewest windows that hold the longest of some prompts, 1 to 3."""
        most = max((len(prompt.shares) for prompt in self._read(prompts, weighted)), default=1)
        return min(most, MOST_WINDOWS)

    def tokens_lost(self, prompt: str, windows: int = 1, weighted: bool = False) -> int:
        """How many of a prompt's tokens do not fit into so many windows and are cut off."""
        return max(sum(read.shares[windows:]) for read in self._read([prompt], weighted))

    def _read(self, prompts: Sequence[str], weighted: bool | Sequence[bool]) -> Iterator[Prompt]:
        """Each prompt as each encoder reads it."""
        return (prompt for reader in self.readers for prompt in reader.read(prompts, weighted))


def load_words(path: str | Path, *, clip_skip: int | None = None, joined: Joined = "ui") -> Words:
    """Load what a model's prompts are read with; of its weights only headers are read.

    Args:
        path: a diffusers folder, its `text_encoder` folder, or a safetensors file.
        clip_skip: the states of SD1.x's encoder that are used, from the end: 1, the last, unless
            said. SD2.x and SDXL have their own; 1 and 2 are accepted for them and change nothing.
        joined: how the windows of a long prompt are joined; see `eri.models.windows`.

    Raises:
        ConfigError: a `clip_skip` that the model cannot follow.
        ModelError: a part is missing, is not supported, or the weights do not fit.
        DiskError: a file may not be read.
    """
    where = Path(path)
    return words_of(text_parts(where), where, clip_skip=clip_skip, joined=joined)


def words_of(
    parts: Sequence[TextPart], where: Path, *, clip_skip: int | None, joined: Joined
) -> Words:
    """As `load_words`, of parts that were found somewhere."""
    if not parts:
        raise ModelError(
            "the model has no text encoder",
            where=printable(where),
            hint="name one in model.text: the folder or file of a model of the same family",
        )
    states = _states(parts, clip_skip)
    length = _length(parts, where)
    _require_fit(parts, where)
    readers = [PromptReader(*_tokenizer(part), length=length, joined=joined) for part in parts]
    return Words(readers, states)


def used_pieces(parts: Sequence[TextPart]) -> list[Pieces]:
    """The tensors of each encoder that are used: a projection is of SDXL's second encoder alone."""
    return [
        {
            name: piece
            for name, piece in part.pieces.items()
            if name != PROJECTION or 0 < index == len(parts) - 1
        }
        for index, part in enumerate(parts)
    ]


def _require_fit(parts: Sequence[TextPart], where: Path) -> None:
    """Refuse tensors that are not those of the encoders, before any is read."""
    if len(parts) > 1 and PROJECTION not in parts[-1].pieces:
        raise ModelError(
            "the second text encoder has no text_projection, which SDXL needs",
            where=printable(where),
            hint="the file may be incomplete: download it again",
        )
    for part, pieces in zip(parts, used_pieces(parts), strict=True):
        require_shapes(text_shapes(part.config, projected=PROJECTION in pieces), pieces, where)


def _length(parts: Sequence[TextPart], where: Path) -> int:
    """The tokens of a window."""
    lengths = [part.config["max_position_embeddings"] for part in parts]
    if len(set(lengths)) > 1 or lengths[0] < 3:
        raise ModelError(
            f"the text encoders read {' and '.join(map(str, lengths))} tokens; they must read "
            "equally many, at least a start, a token and an end",
            where=printable(where),
        )
    return lengths[0]


def _states(parts: Sequence[TextPart], clip_skip: int | None) -> States:
    """Which hidden states the model was trained with, or the person asks for."""
    skip = 1 if clip_skip is None else clip_skip
    # One encoder with quick_gelu is OpenAI's CLIP-L of SD1; with gelu it is OpenCLIP-H of SD2,
    # whose last layer is not among the weights, so that its last state is the last but one.
    if len(parts) == 1 and parts[0].config["hidden_act"] == "quick_gelu":
        layers = parts[0].config["num_hidden_layers"]
        if not 1 <= skip <= layers:
            raise ConfigError(
                f"clip_skip is {skip}, and the text encoder has {layers} layers",
                where="model.clip_skip",
                hint="1 is the last layer, 2 the one before it",
            )
        return States(skip, normed=True)
    if skip not in {1, 2}:
        raise ConfigError(
            f"clip_skip is {skip}; {OWN_STATES}",
            where="model.clip_skip",
            hint="leave model.clip_skip out",
        )
    note = None if clip_skip is None else f"clip_skip changes nothing: {OWN_STATES}"
    return States(1, normed=True, note=note) if len(parts) == 1 else States(2, False, note)


def _tokenizer(part: TextPart) -> tuple[CLIPTokenizer, Marks]:
    """The folder's own tokenizer, or CLIP's."""
    from transformers import CLIPTokenizer

    if part.tokenizer is None:
        vocabulary = clip_vocabulary()
        merges: Any = vocabulary.merges  # pairs are read as well as lines, though not typed so
        tokenizer = CLIPTokenizer(vocab=vocabulary.ids, merges=merges)
        return tokenizer, Marks(vocabulary.ids[START], vocabulary.ids[END], part.pad)
    where = printable(part.tokenizer)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(part.tokenizer, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"the tokenizer cannot be read: {printable(str(error))}",
            where=where,
            hint="download the folder again",
        ) from error
    known = part.config["vocab_size"]
    if len(tokenizer) > known:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, the text encoder knows {known}",
            where=where,
            hint="the two belong to different models: download the folder again",
        )
    marks = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    if None in marks:
        raise ModelError(
            "the tokenizer lacks a token that starts, ends or fills up a prompt",
            where=where,
            hint="download the folder again",
        )
    return tokenizer, Marks(*marks)

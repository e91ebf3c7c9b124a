"""One CLIP text encoder with its tokenizer: tokens of a prompt, and the states of its windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eri.models.weights import parse
from eri.models.windows import Joined, Marks, shares

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

__all__ = ["Prompt", "States", "TextTower"]


@dataclass(frozen=True)
class States:
    """Which hidden states of an encoder are used.

    Attributes:
        depth: counted from the last layer's, which is 1.
        normed: whether they go through the final layer norm.
        note: a sentence for people about a choice that changes nothing.
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


class TextTower(nn.Module):
    """One text encoder with its tokenizer.

    N windows of L tokens become states of width C and, where there is a projection, a pooled text
    of width P.

    Args:
        model: transformers' `CLIPTextModel`.
        projection: of the pooled text.
        tokenizer: its tokenizer.
        marks: of that tokenizer.
        states: which of its states are used.
    """

    def __init__(
        self,
        model: nn.Module,
        projection: nn.Linear | None,
        *,
        tokenizer: CLIPTokenizer,
        marks: Marks,
        states: States,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.text_projection = projection
        self.tokenizer = tokenizer
        self.marks = marks
        self.states = states

    @property
    def inner(self) -> Any:
        """The part with the layers: transformers 5.6 took the `text_model` around them away."""
        return getattr(self.model, "text_model", self.model)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.inner.final_layer_norm.weight.device

    @property
    def length(self) -> int:
        """L, tokens of a window."""
        return self.inner.embeddings.position_embedding.weight.shape[0]

    def read(
        self, prompts: Sequence[str], weighted: bool | Sequence[bool], *, joined: Joined
    ) -> list[Prompt]:
        """Prompts as tokens with their weights; all are tokenized at once.

        Args:
            prompts: any number.
            weighted: whether `(a cat:1.2)` is a weight; of all prompts, or of each.
            joined: how the states of their windows will be joined.
        """
        flags = [weighted] * len(prompts) if isinstance(weighted, bool) else weighted
        parsed = [
            parse(prompt) if flag else [(prompt, 1.0)]
            for prompt, flag in zip(prompts, flags, strict=True)
        ]
        tokens = iter(self.tokens([text for parts in parsed for text, _ in parts]))
        length = self.length
        return [
            _prompt([(next(tokens), weight) for _, weight in parts], length, joined)
            for parts in parsed
        ]

    def tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """Each prompt's own tokens, without start and end."""
        if not prompts:
            return []  # of which transformers makes an IndexError
        # verbose=False: the tokenizer's warning of long prompts is ours to give
        found = self.tokenizer(list(prompts), add_special_tokens=False, verbose=False)
        return found.input_ids

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """States `[N, L, C]` of windows `[N, L]`, and the pooled text `[N, P]` where projected."""
        states = self.states
        output = self.model(ids, output_hidden_states=states.depth > 1 or not states.normed)
        last = output.last_hidden_state
        if states.depth == 1 and states.normed:
            chosen = last
        else:
            chosen = output.hidden_states[-states.depth]
            chosen = self.inner.final_layer_norm(chosen) if states.normed else chosen
        if self.text_projection is None:
            return chosen, None
        # the first end: others may stand in the prompt or fill the window up
        ends = (ids == self.marks.end).int().argmax(dim=1)
        rows = torch.arange(len(ids), device=ids.device)
        return chosen, self.text_projection(last[rows, ends])


def _prompt(parts: Sequence[tuple[list[int], float]], length: int, joined: Joined) -> Prompt:
    """A prompt of parts: the tokens of each, and their weight."""
    return Prompt(
        tokens=[token for tokens, _ in parts for token in tokens],
        weights=[weight for tokens, weight in parts for _ in tokens],
        shares=shares([len(tokens) for tokens, _ in parts], length=length, joined=joined),
    )

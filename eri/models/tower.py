"""One CLIP text encoder with its tokenizer: tokens of a prompt, and the states of its windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eri.models.windows import Marks

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

__all__ = ["States", "TextTower"]


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
    def length(self) -> int:
        """L, tokens of a window."""
        return self.inner.embeddings.position_embedding.weight.shape[0]

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

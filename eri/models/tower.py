"""One CLIP text encoder: windows of tokens to the states that a model was trained with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eri.models.words import PromptReader, States

__all__ = ["TextTower"]


class TextTower(nn.Module):
    """One text encoder, and how it reads prompts.

    N windows of L tokens become states of width C and, where there is a projection, a pooled text
    of width P.

    Args:
        model: transformers' `CLIPTextModel`.
        projection: of the pooled text.
        reader: of its prompts.
        states: which of its states are used.
    """

    def __init__(
        self,
        model: nn.Module,
        projection: nn.Linear | None,
        *,
        reader: PromptReader,
        states: States,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.text_projection = projection
        self.reader = reader
        self.states = states

    @property
    def inner(self) -> Any:
        """The part with the layers: transformers 5.6 took the `text_model` around them away."""
        return getattr(self.model, "text_model", self.model)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.inner.final_layer_norm.weight.device

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
        ends = (ids == self.reader.marks.end).int().argmax(dim=1)
        rows = torch.arange(len(ids), device=ids.device)
        return chosen, self.text_projection(last[rows, ends])

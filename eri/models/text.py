"""Prompts to conditioning: a thin adapter to transformers' CLIP text encoder and tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eri.errors import ModelError
from eri.formats import diffusers_folder
from eri.models.load import fill, read_weights
from eri.printable import printable

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

__all__ = ["TextEncoder", "load_text"]


class TextEncoder:
    """A CLIP text encoder with its tokenizer.

    Args:
        model: the encoder.
        tokenizer: its tokenizer.
        tokens: T, the length that every prompt is padded or cut to, start and end included.
    """

    def __init__(self, model: CLIPTextModel, tokenizer: CLIPTokenizer, tokens: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.tokens = tokens

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Encode prompts.

        Returns:
            The last hidden states after the final layer norm, `[B, T, C]`, and the pooled
            embedding, which this family of models does not use: None.
        """
        ids = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.tokens,
            return_tensors="pt",
        ).input_ids
        return self.model(ids.to(self.model.device)).last_hidden_state, None

    def tokens_lost(self, prompt: str) -> int:
        """How many of a prompt's tokens do not fit and are cut off."""
        # verbose=False: the tokenizer's own warning says the same in other words
        return max(len(self.tokenizer(prompt, verbose=False).input_ids) - self.tokens, 0)


def load_text(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TextEncoder:
    """Build the text encoder of a diffusers folder and load its weights.

    Raises:
        ModelError: a part is missing, its config is not supported, or the weights do not fit.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    root = Path(path)
    folder = diffusers_folder.component(root, "text_encoder")
    config = diffusers_folder.text_config(folder)
    # these token ids stand in the published configs; of them only the pooled state depends
    config |= {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    model: Any = CLIPTextModel(CLIPTextConfig(**config))  # wrapped, which hides its types
    # transformers 5.6 took the inner `text_model` away, files are written with and without it
    inner = getattr(model, "text_model", model)
    weights = {
        name.removeprefix("text_model."): tensor
        for name, tensor in read_weights(diffusers_folder.weights(folder), device, dtype)
        if not name.endswith("position_ids")
    }
    fill(inner, weights, where=folder)
    place = diffusers_folder.component(root, "tokenizer")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(place, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"the tokenizer cannot be read: {printable(str(error))}",
            where=printable(place),
            hint="download the folder again",
        ) from error
    model.to(device).requires_grad_(False).eval()
    return TextEncoder(model, tokenizer, config["max_position_embeddings"])

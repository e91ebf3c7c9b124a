"""Prompts to conditioning: thin adapters to transformers' CLIP text encoder.

How they are read, and which states a model was trained with: `eri.models.words`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eri.formats.checkpoint import text_parts
from eri.formats.parts import Pieces, TextPart
from eri.formats.text_names import PROJECTION
from eri.models.load import fill
from eri.models.tower import TextTower
from eri.models.weights import apply
from eri.models.windows import Joined, join, spread
from eri.models.words import Prompt, PromptReader, States, Words, used_pieces, words_of

__all__ = ["TextEncoder", "load_text"]

WINDOWS_AT_ONCE = 16  # so that the memory a layer takes does not grow with the prompts


class TextEncoder:
    """The text encoders of a model, one or SDXL's two.

    Args:
        words: how they read prompts.
        towers: the encoders, in the order of their channels.
    """

    def __init__(self, words: Words, towers: Sequence[TextTower]) -> None:
        self.words = words
        self.towers = towers
        self.model = nn.ModuleList(towers).requires_grad_(False).eval()
        """All of them."""

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        windows: int = 1,
        weighted: bool | Sequence[bool] = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Encode prompts.

        Args:
            prompts: B of them; what does not fit into the windows is cut off.
            windows: n, how many each prompt is read in, however short it is.
            weighted: whether `(a cat:1.2)` is a weight, as `eri.models.weights` reads it, or just
                text; of all prompts, or of each.

        Returns:
            The text states, `[B, T, C]`, T = n·L or n·(L-2) + 2 as the words say that windows are
            joined, and the pooled text `[B, P]` of each first window, None where the model has
            none. Weights change the states only, of each encoder by itself.

        Raises:
            ValueError: no prompt, or no window, or one text instead of a list.
        """
        if isinstance(prompts, str) or not prompts or windows < 1:
            raise ValueError("TextEncoder.encode takes a list of prompts and at least one window")
        contexts, pooled = [], None
        for tower in self.towers:
            states, pools = _states(tower, tower.reader.read(prompts, weighted), windows)
            contexts.append(join(states, joined=self.words.joined))
            pooled = pools if pools is not None else pooled
        return torch.cat(contexts, dim=-1), pooled


def _states(
    tower: TextTower, prompts: Sequence[Prompt], windows: int
) -> tuple[Tensor, Tensor | None]:
    """States `[B, n, L, C]` with their weights, and the first windows' pooled text `[B, P]`."""
    states, pools = _run(tower, prompts, windows)
    if not any(weight != 1 for prompt in prompts for weight in prompt.weights):
        return states, pools
    empty, _ = _run(tower, [Prompt([], [], [0])], windows)
    weights = [
        spread(prompt.weights, prompt.shares, length=tower.reader.length, windows=windows)
        for prompt in prompts
    ]
    return apply(states, empty, torch.tensor(weights, device=states.device)), pools


def _run(tower: TextTower, prompts: Sequence[Prompt], windows: int) -> tuple[Tensor, Tensor | None]:
    """States `[B, n, L, C]`, and the first windows' pooled text `[B, P]`."""
    reader = tower.reader
    cuts = [reader.cut(prompt, windows) for prompt in prompts]
    ids = torch.tensor(cuts, dtype=torch.long, device=tower.device).reshape(-1, reader.length)
    done = [tower(part) for part in ids.split(WINDOWS_AT_ONCE)]
    states = torch.cat([part for part, _ in done]).unflatten(0, (len(cuts), windows))
    pools = [pool for _, pool in done if pool is not None]
    return states, torch.cat(pools)[::windows] if pools else None


def load_text(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    clip_skip: int | None = None,
    joined: Joined = "ui",
) -> TextEncoder:
    """Build a model's text encoders and load their weights.

    Args:
        path: a diffusers folder, its `text_encoder` folder, or a safetensors file.
        dtype: of the weights.
        device: of the weights.
        clip_skip: as `eri.models.words.load_words` takes it.
        joined: how the windows of a long prompt are joined; see `eri.models.windows`.

    Returns:
        The encoders, frozen, in evaluation mode.

    Raises:
        ConfigError: a `clip_skip` that the model cannot follow.
        ModelError: a part is missing, is not supported, or the weights do not fit.
        DiskError: a file may not be read.
    """
    where = Path(path)
    parts = text_parts(where)
    words = words_of(parts, where, clip_skip=clip_skip, joined=joined)
    towers = []
    for part, pieces, reader in zip(parts, used_pieces(parts), words.readers, strict=True):
        tower = _build(part, reader, words.states, projected=PROJECTION in pieces)
        _fill(tower, pieces, dtype=dtype, device=device, where=where)
        towers.append(tower)
    return TextEncoder(words, towers)


def _build(part: TextPart, reader: PromptReader, states: States, *, projected: bool) -> TextTower:
    """An encoder on the meta device, without weights: initialising bigG's takes long."""
    from transformers import CLIPTextConfig, CLIPTextModel

    # these token ids stand in all published configs; what they are for is not used here
    config: Any = part.config | {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    width, pooled = config["hidden_size"], config["projection_dim"]
    with torch.device("meta"):
        model: Any = CLIPTextModel(CLIPTextConfig(**config))  # wrapped, which hides its types
        projection = nn.Linear(width, pooled, bias=False) if projected else None
    return TextTower(model, projection, reader=reader, states=states)


def _fill(
    tower: TextTower,
    pieces: Pieces,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    where: Path,
) -> None:
    inner = {name: piece for name, piece in pieces.items() if name != PROJECTION}
    fill(tower.inner, inner, dtype=dtype, device=device, where=where)
    if tower.text_projection is not None:
        projection = {"weight": pieces[PROJECTION]}
        fill(tower.text_projection, projection, dtype=dtype, device=device, where=where)
    positions = torch.arange(tower.reader.length, device=device)[None]
    tower.inner.embeddings.register_buffer("position_ids", positions, persistent=False)

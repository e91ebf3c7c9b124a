"""Prompts to conditioning: thin adapters to transformers' CLIP text encoder and tokenizer.

Which states a model was trained with, counted from the last layer's, which is 1:

    SD1.x   1, or `clip_skip`, after the final layer norm
    SD2.x   the last of the layers that it uses, after the final layer norm
    SDXL    2 of both encoders, without the norm, side by side; and of the second encoder the last
            state of the end token, after the norm, projected: the pooled text

Source: the pipelines of diffusers, and Podell et al., arXiv 2307.01952, section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eri.errors import ConfigError, ModelError
from eri.formats.checkpoint import text_parts
from eri.formats.parts import Pieces, TextPart
from eri.models.load import fill, require_fit
from eri.models.tower import Prompt, States, TextTower
from eri.models.vocabulary import END, START, clip_vocabulary
from eri.models.weights import apply
from eri.models.windows import MOST_WINDOWS, Joined, Marks, cut, join, spread
from eri.printable import printable

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

__all__ = ["TextEncoder", "load_text"]

WINDOWS_AT_ONCE = 16  # so that the memory a layer takes does not grow with the prompts
PROJECTION = "text_projection.weight"
OWN_STATES = "SD2.x and SDXL are trained with the last states but one of their text encoders"


class TextEncoder:
    """The text encoders of a model, one or SDXL's two, with their tokenizers.

    Args:
        towers: the encoders, in the order of their channels.
        joined: how the windows of a long prompt are joined; see `eri.models.windows`.
        clip_skip_note: a sentence for people about a `clip_skip` that changes nothing.
    """

    def __init__(
        self,
        towers: Sequence[TextTower],
        *,
        joined: Joined = "ui",
        clip_skip_note: str | None = None,
    ) -> None:
        self.towers = towers
        self.model = nn.ModuleList(towers).requires_grad_(False).eval()
        """All of them."""
        self.joined: Joined = joined
        self.clip_skip_note = clip_skip_note
        self.tokens = towers[0].length
        """L, the tokens of a window, start and end included."""

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
            The text states, `[B, T, C]`, T = n·L or n·(L-2) + 2 as `joined` says, and the pooled
            text `[B, P]` of each first window, None where the model has none. Weights change the
            states only, of each encoder by itself.

        Raises:
            ValueError: no prompt, or no window, or one text instead of a list; or the encoder was
                loaded without its weights.
        """
        if isinstance(prompts, str) or not prompts or windows < 1:
            raise ValueError("TextEncoder.encode takes a list of prompts and at least one window")
        if self.towers[0].device.type == "meta":
            raise ValueError("this TextEncoder was loaded to count tokens, without its weights")
        contexts, pooled = [], None
        for tower in self.towers:
            read = tower.read(prompts, weighted, joined=self.joined)
            states, pools = self._states(tower, read, windows)
            contexts.append(join(states, joined=self.joined))
            pooled = pools if pools is not None else pooled
        return torch.cat(contexts, dim=-1), pooled

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
        return (
            prompt
            for tower in self.towers
            for prompt in tower.read(prompts, weighted, joined=self.joined)
        )

    def _states(
        self, tower: TextTower, prompts: Sequence[Prompt], windows: int
    ) -> tuple[Tensor, Tensor | None]:
        """States `[B, n, L, C]` with their weights, and the first windows' pooled text `[B, P]`."""
        states, pools = self._run(tower, prompts, windows)
        if not any(weight != 1 for prompt in prompts for weight in prompt.weights):
            return states, pools
        empty, _ = self._run(tower, [Prompt([], [], [0])], windows)
        weights = [
            spread(prompt.weights, prompt.shares, length=self.tokens, windows=windows)
            for prompt in prompts
        ]
        return apply(states, empty, torch.tensor(weights, device=states.device)), pools

    def _run(
        self, tower: TextTower, prompts: Sequence[Prompt], windows: int
    ) -> tuple[Tensor, Tensor | None]:
        """States `[B, n, L, C]`, and the first windows' pooled text `[B, P]`."""
        cuts = [
            cut(
                prompt.tokens,
                prompt.shares,
                tower.marks,
                length=self.tokens,
                windows=windows,
                joined=self.joined,
            )
            for prompt in prompts
        ]
        ids = torch.tensor(cuts, dtype=torch.long, device=tower.device).reshape(-1, self.tokens)
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
        device: of the weights; on `meta` none are read, and the encoder only counts tokens.
        clip_skip: the states of SD1.x's encoder that are used, from the end: 1, the last, unless
            said. SD2.x and SDXL have their own; 1 and 2 are accepted for them and change nothing.
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
    if not parts:
        raise ModelError(
            "the model has no text encoder",
            where=printable(where),
            hint="name one in model.text: the folder or file of a model of the same family",
        )
    states = _states(parts, clip_skip)
    _check_windows(parts, where)
    towers = []
    for index, part in enumerate(parts):
        pooled = len(parts) > 1 and index == len(parts) - 1
        tower = _build(part, states, pooled=pooled, where=where)
        _load(tower, part, dtype=dtype, device=device, where=where)
        towers.append(tower)
    return TextEncoder(towers, joined=joined, clip_skip_note=states.note)


def _check_windows(parts: Sequence[TextPart], where: Path) -> None:
    lengths = [part.config["max_position_embeddings"] for part in parts]
    if len(set(lengths)) > 1 or lengths[0] < 3:
        raise ModelError(
            f"the text encoders read {' and '.join(map(str, lengths))} tokens; they must read "
            "equally many, at least a start, a token and an end",
            where=printable(where),
        )


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


def _build(part: TextPart, states: States, *, pooled: bool, where: Path) -> TextTower:
    """An encoder on the meta device, without weights: initialising bigG's takes long."""
    from transformers import CLIPTextConfig, CLIPTextModel

    if pooled and PROJECTION not in part.pieces:
        raise ModelError(
            "the second text encoder has no text_projection, which SDXL needs",
            where=printable(where),
            hint="the file may be incomplete: download it again",
        )
    tokenizer, marks = _tokenizer(part)
    # these token ids stand in all published configs; what they are for is not used here
    config: Any = part.config | {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    width, projected = config["hidden_size"], config["projection_dim"]
    with torch.device("meta"):
        model: Any = CLIPTextModel(CLIPTextConfig(**config))  # wrapped, which hides its types
        projection = nn.Linear(width, projected, bias=False) if pooled else None
    return TextTower(model, projection, tokenizer=tokenizer, marks=marks, states=states)


def _load(
    tower: TextTower,
    part: TextPart,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    where: Path,
) -> None:
    pieces = dict(part.pieces)
    projection = pieces.pop(PROJECTION, None)  # only SDXL's second encoder uses it
    modules: list[tuple[nn.Module, Pieces]] = [(tower.inner, pieces)]
    if tower.text_projection is not None and projection is not None:
        modules.append((tower.text_projection, {"weight": projection}))
    if torch.device(device).type == "meta":
        for module, its in modules:
            require_fit(module, its, where)
        return
    for module, its in modules:
        fill(module, its, dtype=dtype, device=device, where=where)
    positions = torch.arange(tower.length, device=device)[None]
    tower.inner.embeddings.register_buffer("position_ids", positions, persistent=False)


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

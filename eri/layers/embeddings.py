"""Rows of a table by token number."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from eri.layers.init import normal
from eri.layers.weights import OwnsWeights, Provider

__all__ = ["Embeddings"]


class Embeddings(OwnsWeights):
    """Tokens `[B, T]` to their rows `[B, T, features]` of `weight` `[vocab, features]`.

    `Embeddings(table)` trains the given table; `Embeddings(vocab, features)` makes one from
    N(0, 0.02²). Tokens are integers, or floats with integer values (float32 holds them exactly up
    to 2²⁴). In the backward pass repeated tokens add up in their row.

    Seed rows: B20–B23.

    Args:
        table: `[vocab, features]`, or the number of tokens.
        features: width of a row, when `table` is a number.
        provide_weights: called by `load_from_provider` with the table.

    Raises:
        ValueError: the table is not a matrix, or the two forms are mixed.
    """

    def __init__(
        self,
        table: Tensor | int,
        features: int | None = None,
        *,
        provide_weights: Provider | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(table, int):
            if features is None:
                raise ValueError("Embeddings: a number of tokens needs features, found None")
            table = normal(torch.empty(table, features, device=device, dtype=dtype))
        elif features is not None or table.dim() != 2:
            raise ValueError(
                "Embeddings: expected a table [vocab, features] alone, "
                f"found shape {list(table.shape)} and features = {features}"
            )
        else:
            table = table.to(device=device, dtype=dtype)
        self.weight = table if isinstance(table, nn.Parameter) else nn.Parameter(table)
        self.provide_weights = provide_weights

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up tokens of any shape.

        Raises:
            ValueError: a float token is not an integer.
            IndexError: a token is not in [0, vocab).
        """
        if tokens.numel():
            self._check(tokens)
        return F.embedding(tokens.long(), self.weight)

    def _check(self, tokens: Tensor) -> None:
        if tokens.is_floating_point() and (tokens != tokens.trunc()).any():
            wrong = tokens[tokens != tokens.trunc()][0].item()
            raise ValueError(f"Embeddings: expected integer tokens, found {wrong}")
        low, high = tokens.aminmax()
        if low < 0 or high >= self.weight.shape[0]:
            raise IndexError(
                f"Embeddings: expected tokens in [0, {self.weight.shape[0]}), "
                f"found {low.item():g} to {high.item():g}"
            )

    def extra_repr(self) -> str:
        """The table's size."""
        vocab, features = self.weight.shape
        return f"vocab={vocab}, features={features}"

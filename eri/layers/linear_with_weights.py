"""A linear map by a weight that belongs to somebody else."""

from torch import Tensor, nn

from eri.layers.checks import shape_error

__all__ = ["LinearWithWeights"]


class LinearWithWeights(nn.Module):
    """y = x W with a given W `[in, out]` that this layer does not own.

    Gradients reach the given tensor, but it is neither a parameter nor in the state dict here, and
    its owner moves it between devices. For an output head tied to an embedding table
    `[vocab, features]`, give the table itself with `transposed=True`: the tie then survives
    everything that happens to the table.

    Seed rows: B28–B30.

    Args:
        weight: `[in, out]`, or `[out, in]` if transposed.
        transposed: use the weight's transpose.

    Raises:
        ValueError: the weight is not a matrix.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, *, transposed: bool = False) -> None:
        super().__init__()
        if weight.dim() != 2:
            raise shape_error(self, weight, "[in, out] for the weight")
        self.transposed = transposed
        # Assigning a parameter in the usual way would make this layer its owner.
        object.__setattr__(self, "weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`.

        Raises:
            ValueError: the last dimension is not `in`.
        """
        weight = self.weight.T if self.transposed else self.weight
        if x.shape[-1:] != weight.shape[:1]:
            raise shape_error(self, x, f"[..., {weight.shape[0]}]")
        return x @ weight

    def extra_repr(self) -> str:
        """The weight's size."""
        return f"weight={list(self.weight.shape)}, transposed={self.transposed}"

"""A chain of layers."""

from torch import Tensor, nn

from eri.layers.weights import OwnsWeights

__all__ = ["Layers"]


class Layers(nn.Sequential, OwnsWeights):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Layers one after the other; without any, the identity.

    `for_update` lists the trainable weights of all layers in order, a shared one once;
    `load_from_provider` asks every layer that has a provider.

    Seed rows: B50–B52.
    """

    def forward_all(self, input: Tensor) -> tuple[list[Tensor], Tensor]:
        """The output of every layer in order, and the output of the chain."""
        outputs: list[Tensor] = []
        for layer in self:
            input = layer(input)
            outputs.append(input)
        return outputs, input

    def load_from_provider(self) -> None:
        """Let the providers of the layers fill their weights in place.

        Raises:
            RuntimeError: the weights of one of those layers do not exist yet.
        """
        for layer in self:
            if isinstance(layer, OwnsWeights):
                layer.load_from_provider()

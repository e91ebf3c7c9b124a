"""Layers that know their trainable weights: sized once, listed for update, filled by a provider.

The second document compiles a layer before use, which creates its weights from the input's sizes.
Here the first input does it: the layers that need the input's width are lazy PyTorch modules, whose
weights come into being at the first forward pass, at `materialize`, or when a state dict is loaded,
and are never created again.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["OwnsWeights", "Provider", "materialize"]

Provider = Callable[..., object]
"""Called with a layer's weights, to be filled in place; see `OwnsWeights.provider_views`."""


class OwnsWeights(nn.Module):
    """A layer that lists its weights for the optimizer and takes them from a provider.

    Seed rows: B01, B04–B06.
    """

    provide_weights: Provider | None = None

    def for_update(self) -> list[nn.Parameter]:
        """The trainable weights in the documented order, each once.

        Raises:
            RuntimeError: the weights do not exist yet.
        """
        return [weight for weight in self._existing_weights() if weight.requires_grad]

    def provider_views(self) -> tuple[Tensor | None, ...]:
        """The weights as a provider sees them: detached views in the second document's layout.

        Raises:
            RuntimeError: the weights do not exist yet.
        """
        return tuple(weight.detach() for weight in self._existing_weights())

    def load_from_provider(self) -> None:
        """Let the provider, if there is one, fill the weights in place.

        Raises:
            RuntimeError: the weights do not exist yet.
        """
        if self.provide_weights is not None:
            self.provide_weights(*self.provider_views())

    def _existing_weights(self) -> list[nn.Parameter]:
        weights = list(self.parameters())
        if any(is_lazy(weight) for weight in weights):
            raise RuntimeError(
                f"{type(self).__name__}: the weights do not exist yet; "
                "run the layer or eri.layers.materialize on an input first"
            )
        return weights


@torch.no_grad()
def materialize(module: nn.Module, input: Tensor) -> Tensor:
    """Create the weights of every lazy layer inside `module` by running one input through it.

    Runs in evaluation mode, so neither dropout nor running statistics advance; weights that exist
    stay as they are.

    Seed rows: B01, B02.

    Returns:
        The module's output.
    """
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        return module(input)
    finally:
        for part, mode in training.items():
            part.training = mode

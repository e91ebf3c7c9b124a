"""Many small parameters in one piece of memory, so that an optimizer treats them as one.

Source: "flat parameters" as in Rajbhandari et al., "ZeRO", arXiv 1910.02054, section 5.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["Flat"]

ALIGNMENT = 8  # elements, that is 32 bytes


class Flat:
    """The memory of some parameters, of their gradients and of what Adam keeps of them.

    All buffers are `[n]` and laid out alike; a parameter begins at a multiple of 8 elements, and
    the gaps are zero. The parameters become views of `master` and their gradients views of `grad`.

    Args:
        parameters: by name, float32, on one device; they lie in this order.
        copy: makes all copies that others read; called by `changed`.

    Raises:
        ValueError: no parameter, or one that is not float32.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], copy: Callable[[], None] = lambda: None
    ) -> None:
        wrong = {name: p.dtype for name, p in parameters.items() if p.dtype != torch.float32}
        if wrong or not parameters:
            raise ValueError(f"Flat: expected float32 parameters, found {wrong or 'none'}")
        self.parameters = dict(parameters)
        self._starts: dict[str, int] = {}
        size = 0
        for name, parameter in parameters.items():
            self._starts[name] = size
            size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        device = next(iter(parameters.values())).device
        self.master = torch.zeros(size, device=device)
        self.grad = torch.zeros_like(self.master)
        self.exp_avg = torch.zeros_like(self.master)
        self.exp_avg_sq = torch.zeros_like(self.master)
        for name, view in self.views(self.master).items():
            view.copy_(parameters[name].detach())
            parameters[name].data = view
        for name, view in self.views(self.grad).items():
            parameters[name].grad = view
        self.changed = copy

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The part of a buffer that belongs to each parameter, in its shape."""
        return {
            name: buffer.narrow(0, start, self.parameters[name].numel()).view_as(
                self.parameters[name]
            )
            for name, start in self._starts.items()
        }

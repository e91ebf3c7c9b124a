"""Many small parameters in one piece of memory, so that an optimizer treats them as one.

Source: "flat parameters" as in Rajbhandari et al., "ZeRO", arXiv 1910.02054, section 5.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["Flat"]

ALIGNMENT = 8  # elements; a 16-bit shadow then begins at a multiple of 16 bytes


class Flat:
    """The memory of some parameters, of their gradients and of what Adam keeps of them.

    All buffers are `[n]` and laid out alike; a parameter begins at a multiple of 8 elements, and
    the gaps are zero. The parameters become views of `master` and their gradients views of `grad`.

    Args:
        parameters: by name, float32, on one device; they lie in this order.
        dtype: of the shadow.

    Raises:
        ValueError: no parameter, or one that is not float32.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
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
        self.shadow = self.master.to(dtype)  # master itself where dtype is float32

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The part of a buffer that belongs to each parameter, in its shape."""
        return {
            name: buffer.narrow(0, start, self.parameters[name].numel()).view_as(
                self.parameters[name]
            )
            for name, start in self._starts.items()
        }

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the shadow equal to the parameters, after somebody else has changed them."""
        if self.shadow is not self.master:
            self.shadow.copy_(self.master)

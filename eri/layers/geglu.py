r"""The gate of a transformer's feed-forward, forward and backward, keeping its input alone.

$$a = v \odot \mathrm{gelu}(g),\quad [v, g] = u,\quad \mathrm{gelu}(g) = g\,\Phi(g)$$

with the exact Φ (erf), and

$$dv = da \odot \mathrm{gelu}(g),\quad dg = da \odot v \odot (\Phi(g) + g\,\varphi(g))$$

Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202, section 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["geglu", "geglu_backward"]


def geglu(u: Tensor) -> Tensor:
    """`[..., 2·W]`, values and gates, to `[..., W]`; without a gradient of its own."""
    value, gate = u.chunk(2, dim=-1)
    return F.gelu(gate).mul_(value)


def geglu_backward(da: Tensor, u: Tensor) -> Tensor:
    """The gradient of u `[..., 2·W]` from that of a `[..., W]`."""
    value, gate = u.chunk(2, dim=-1)
    du = torch.empty_like(u)
    d_value, d_gate = du.chunk(2, dim=-1)
    torch.mul(da, F.gelu(gate), out=d_value)
    torch.ops.aten.gelu_backward.grad_input(da * value, gate, grad_input=d_gate)
    return du

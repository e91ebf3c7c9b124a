"""RMSNorm, MulRows, SwiGLU's gate and rotary positions: layers that no U-Net here has.

They are timed at the sizes of its transformer blocks all the same.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from eri.layers.heads import split_heads
from eri.layers.rope import apply_rope
from eri.layers.scale_rows import mul_rows, rms_norm
from eri.layers.swiglu import swiglu, swiglu_reference
from scripts.benchmark.kernel_shapes import Level
from scripts.benchmark.kernel_work import Case, Draw, Work, of_table

__all__ = ["layer_cases"]

ATEN = torch.ops.aten
EPS = 1e-5
BASE = 10000.0  # of rotary positions


def _rms_norm(rows: int, width: int, draw: Draw) -> Work:
    x, weight = draw(rows, width), draw(width)
    theirs = partial(F.rms_norm, x, [width], weight, EPS)
    return Work(partial(rms_norm, x, weight, EPS), theirs, 2 * x.nbytes + weight.nbytes)


def _rms_norm_backward(rows: int, width: int, draw: Draw) -> Work:
    dy, x, weight = draw(rows, width), draw(rows, width), draw(width)
    rms_norm(x, weight, EPS)  # loads the kernels
    ours = partial(torch.ops.eri.scale_rows_backward, dy, x, weight, EPS, True)
    return Work(ours, partial(_RMSNormGradient(x, weight), dy), 3 * x.nbytes + 2 * weight.nbytes)


class _RMSNormGradient:
    """Those of x and of the weight, by PyTorch; on a CPU by autograd, for want of an operation."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self.x, self.weight, self.width = x, weight, [x.shape[1]]
        self.kept = ATEN._fused_rms_norm(x, self.width, weight, EPS)[1]

    def __call__(self, dy: Tensor) -> object:
        if dy.is_cuda:
            given = (dy, self.x, self.width, self.kept, self.weight, [True, True])
            return ATEN._fused_rms_norm_backward(*given)
        x, weight = (leaf.detach().requires_grad_() for leaf in (self.x, self.weight))
        with torch.enable_grad():
            y = F.rms_norm(x, self.width, weight, EPS)
        return torch.autograd.grad(y, [x, weight], dy)


def _mul_rows(rows: int, width: int, draw: Draw) -> Work:
    x, weight = draw(rows, width), draw(width)
    moved = 2 * x.nbytes + weight.nbytes
    return Work(partial(mul_rows, x, weight), partial(torch.mul, x, weight), moved)


def _mul_rows_backward(rows: int, width: int, draw: Draw) -> Work:
    dy, x, weight = draw(rows, width), draw(rows, width), draw(width)
    mul_rows(x, weight)  # loads the kernels
    ours = partial(torch.ops.eri.scale_rows_backward, dy, x, weight, None, True)
    return Work(ours, lambda: (dy * weight, (dy * x).sum(0)), 3 * x.nbytes + 2 * weight.nbytes)


def _swiglu(rows: int, width: int, draw: Draw) -> Work:
    gate, value = draw(rows, width), draw(rows, width)
    ours, theirs = (partial(one, gate, value) for one in (swiglu, swiglu_reference))
    return Work(ours, theirs, 3 * gate.nbytes)


def _swiglu_backward(rows: int, width: int, draw: Draw) -> Work:
    dy, gate, value = (draw(rows, width) for _ in range(3))
    swiglu(gate, value)  # loads the kernels
    kept = F.silu(gate)
    ours = partial(torch.ops.eri.swiglu_backward, dy, gate, value)
    return Work(ours, lambda: (ATEN.silu_backward(dy * value, gate), dy * kept), 5 * gate.nbytes)


def _rope(batch: int, level: Level, draw: Draw) -> Work:
    """Beside complex numbers of float32 and kept angles, as LLaMA's own code rotates."""
    x = split_heads(draw(batch, level.tokens, level.width), level.heads)
    size = x.shape[-1]
    angles = BASE ** (-torch.arange(0, size, 2, device=draw.device) / size)
    angles = torch.arange(level.tokens, device=draw.device)[:, None] * angles
    turns = torch.polar(torch.ones_like(angles), angles)

    def theirs() -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)

    return Work(partial(apply_rope, x, base=BASE), theirs, 2 * x.nbytes)


def layer_cases(name: str, level: Level, batch: int) -> Iterator[Case]:
    """Their kernels, at the sizes of a transformer block."""
    rows, width, wide = batch * level.tokens, level.width, 4 * level.width
    heads = f"[{batch}, {level.heads}, {level.tokens}, {width // level.heads}]"
    table = [
        ("scale_rows", f"[{rows}, {width}] RMSNorm", _rms_norm, rows, width),
        ("scale_rows_backward", f"[{rows}, {width}] RMSNorm", _rms_norm_backward, rows, width),
        ("scale_rows", f"[{rows}, {width}] MulRows", _mul_rows, rows, width),
        ("scale_rows_backward", f"[{rows}, {width}] MulRows", _mul_rows_backward, rows, width),
        ("swiglu", f"[{rows}, {wide}]", _swiglu, rows, wide),
        ("swiglu_backward", f"[{rows}, {wide}]", _swiglu_backward, rows, wide),
        ("rope", heads, _rope, batch, level),
    ]
    yield from of_table(name, table)

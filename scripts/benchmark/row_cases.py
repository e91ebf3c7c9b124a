"""Norms and gates of a transformer block's rows, and norms with the product of what they write.

Ops with a narrow product are called as they are: their functions in `eri.layers.narrow` take two
kernels where one cannot do both, and the time of those would stand here.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eri.layers.geglu import geglu, geglu_backward, geglu_backward_reference, geglu_reference
from eri.layers.geglu_lora import geglu_backward_lora, geglu_backward_lora_reference
from eri.layers.layer_norm import add_layer_norm, layer_norm, layer_norm_backward
from eri.layers.lora_products import Narrow
from eri.layers.narrow import add_layer_norm_narrow, layer_norm_backward_narrow
from scripts.benchmark.kernel_shapes import Level, Net
from scripts.benchmark.kernel_work import Case, Draw, Work, of_table

__all__ = ["row_cases"]

ATEN = torch.ops.aten
SCALE = 1.0  # of a narrow product


# ------------------------------------------------------------------------------------------- norms


def _layer_norm(rows: int, width: int, tail: int, draw: Draw) -> Work:
    x, norm = draw(rows, width), draw.frozen(nn.LayerNorm(width))
    theirs = partial(F.layer_norm, x, [width], norm.weight, norm.bias)
    return Work(partial(layer_norm, x, norm, tail), theirs, 2 * x.nbytes + 8 * rows)


def _add_layer_norm(rows: int, width: int, tail: int, draw: Draw) -> Work:
    x, added, norm = draw(rows, width), draw(rows, width), draw.frozen(nn.LayerNorm(width))

    def theirs() -> object:
        total = x + added
        return total, F.layer_norm(total, [width], norm.weight, norm.bias)

    return Work(partial(add_layer_norm, x, added, norm, tail), theirs, 4 * x.nbytes + 8 * rows)


def _layer_norm_backward(rows: int, width: int, tail: int, draw: Draw) -> Work:
    dn, x, norm = draw(rows, width), draw(rows, width), draw.frozen(nn.LayerNorm(width))
    residual = draw(rows, width + tail)[:, :width]
    _, moments = layer_norm(x, norm)
    theirs = _layer_norm_gradient(dn, x, norm, residual)
    ours = partial(layer_norm_backward, dn, x, moments, norm, residual, tail)
    return Work(ours, theirs, 5 * x.nbytes + 8 * rows)


def _layer_norm_gradient(
    dn: Tensor, x: Tensor, norm: nn.LayerNorm, residual: Tensor
) -> Callable[[], tuple[Tensor, Tensor]]:
    """The gradient of x by PyTorch, and the norm once more."""
    width = [x.shape[1]]
    _, *kept = torch.native_layer_norm(x, width, norm.weight, norm.bias, norm.eps)

    def run() -> tuple[Tensor, Tensor]:
        given = (dn, x, width, *kept, norm.weight, None, [True, False, False])
        dx = ATEN.native_layer_norm_backward(*given)[0].add_(residual)
        return dx, F.layer_norm(x, width, norm.weight, norm.bias)

    return run


# ------------------------------------------------------------------------------------------- gates


def _geglu(rows: int, width: int, tail: int, draw: Draw) -> Work:
    u = draw(rows, 2 * width)
    return Work(partial(geglu, u, tail), partial(geglu_reference, u), 3 * u.nbytes // 2)


def _geglu_backward(rows: int, width: int, tail: int, draw: Draw) -> Work:
    u, da = draw(rows, 2 * width), draw(rows, width)

    def theirs() -> object:
        return geglu_backward_reference(da, u), geglu_reference(u)

    return Work(partial(geglu_backward, da, u, tail), theirs, 3 * u.nbytes)


def _geglu_backward_lora(rows: int, width: int, ranks: int, draw: Draw) -> Work:
    u, da, p, h = (draw(rows, of) for of in (2 * width, width, ranks, ranks))
    d_down, d_up = draw.single(ranks, width), draw.single(2 * width, ranks)
    given, up = (da, u, p, h, d_down, d_up), draw(ranks, 2 * width)
    geglu_backward_lora(*given, Narrow(up, 1, SCALE))  # loads the kernels
    given = (*given, up, SCALE)
    sums = 2 * (d_down.nbytes + d_up.nbytes)
    moved = da.nbytes + 2 * u.nbytes + p.nbytes + h.nbytes + sums + _product_bytes(u, up)
    theirs = partial(geglu_backward_lora_reference, *given)
    return Work(partial(torch.ops.eri.geglu_backward_lora, *given), theirs, moved)


# -------------------------------------------------------------------------------- narrow products


def _product_bytes(rows: Tensor, down: Tensor) -> int:
    """That a narrow product adds: A, and H twice. What it multiplies is there."""
    return down.nbytes + 2 * len(rows) * len(down) * down.element_size()


def _add_layer_norm_narrow(rows: int, width: int, ranks: int, draw: Draw) -> Work:
    x, added, down = draw(rows, width), draw(rows, width), draw(ranks, width)
    norm = draw.frozen(nn.LayerNorm(width))
    add_layer_norm_narrow(x, added, norm, Narrow(down, 1, SCALE))  # loads the kernels
    given = (x, added, norm.weight, norm.bias, norm.eps, down, SCALE)

    def theirs() -> object:
        total = x + added
        n = F.layer_norm(total, [width], norm.weight, norm.bias)
        return total, n, n @ down.T

    moved = 4 * x.nbytes + 8 * rows + _product_bytes(x, down)
    return Work(partial(torch.ops.eri.add_layer_norm_narrow, *given), theirs, moved)


def _layer_norm_backward_narrow(rows: int, width: int, ranks: int, draw: Draw) -> Work:
    dn, x, down = draw(rows, width), draw(rows, width), draw(ranks, width)
    norm, residual = draw.frozen(nn.LayerNorm(width)), draw(rows, width + ranks)[:, :width]
    _, moments = layer_norm(x, norm)
    narrow = Narrow(down, 1, SCALE)
    layer_norm_backward_narrow(dn, x, moments, norm, residual, narrow)  # loads the kernels
    given = (dn, x, moments, norm.weight, norm.bias, residual, down, SCALE)
    gradient = _layer_norm_gradient(dn, x, norm, residual)

    def theirs() -> object:
        dx, n = gradient()
        return dx, n, dx @ down.T

    moved = 5 * x.nbytes + 8 * rows + _product_bytes(x, down)
    return Work(partial(torch.ops.eri.layer_norm_backward_narrow, *given), theirs, moved)


# --------------------------------------------------------------------------------------- the table


def row_cases(name: str, net: Net, level: Level, batch: int) -> Iterator[Case]:
    """The kernels of a transformer block, with the tails that it leaves for its projections."""
    rows, width, one = batch * level.tokens, level.width, net.rank
    three, wide = 3 * one, 4 * width
    of_norm, of_gate = f"[{rows}, {width}]", f"[{rows}, 2·{wide}]"
    table = [
        ("layer_norm", of_norm, _layer_norm, rows, width, three),
        ("add_layer_norm", of_norm, _add_layer_norm, rows, width, one),
        ("layer_norm_backward", of_norm, _layer_norm_backward, rows, width, one),
        ("geglu", of_gate, _geglu, rows, wide, one),
        ("geglu_backward", of_gate, _geglu_backward, rows, wide, one),
        ("geglu_backward_lora", f"{of_gate} to {one}", _geglu_backward_lora, rows, wide, one),
        *(
            (kernel, f"{of_norm} to {ranks}", make, rows, width, ranks)
            for kernel, make, ranks in (
                ("add_layer_norm_narrow", _add_layer_norm_narrow, three),
                ("add_layer_norm_narrow", _add_layer_norm_narrow, one),
                ("layer_norm_backward_narrow", _layer_norm_backward_narrow, one),
            )
        ),
    ]
    yield from of_table(name, table)

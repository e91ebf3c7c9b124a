"""What each of eri's kernels does, what PyTorch does for it, and how many bytes that has to move.

Bytes are those of the operands: what is read counts once and what is written counts once, unless
the algorithm itself needs more, as AdamW, which reads the gradient once for its norm and once for
the update. What a kernel reads twice because it does so counts once. A tail is not counted where it
is left open.

What stands for PyTorch is what its autograd would run: its own operations on results that were kept
from the forward pass where it keeps them, and for several results of one kernel all of them, but no
tails and no second copies.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eri.layers.adamw import CONTROL_SIZE, Control, adamw_, adamw_workspace
from eri.layers.cross_attention import cross_attention, cross_attention_backward
from eri.layers.geglu import geglu, geglu_backward, geglu_backward_reference, geglu_reference
from eri.layers.group_norm_silu import group_norm_silu
from eri.layers.join_rows import join_rows
from eri.layers.layer_norm import add_layer_norm, layer_norm, layer_norm_backward
from eri.layers.lora import MatrixCopy
from eri.layers.lora_copies import LoRACopies
from eri.layers.lora_products import lora_down, lora_gradient
from eri.layers.sdpa import sdpa, sdpa_backward
from scripts.benchmark.kernel_shapes import BATCHES, Level, Net

__all__ = ["KERNELS", "Case", "Draw", "Work", "cases"]

Norm = TypeVar("Norm", nn.LayerNorm, nn.GroupNorm)
ATEN = torch.ops.aten
GROUPS = 32
ADAMW_BYTES = 4 * (2 + 3) + 4 * (3 + 1)  # read: the gradient twice, three more; written: all four


class Work(NamedTuple):
    """One set of operands, and what is done with it."""

    ours: Callable[[], object]
    theirs: Callable[[], object]  # PyTorch's own operations for the same
    bytes: int


@dataclass(frozen=True)
class Draw:
    """Random operands.

    Attributes:
        device: where they are.
        dtype: of them.
    """

    device: torch.device
    dtype: torch.dtype = torch.bfloat16

    def __call__(self, *sizes: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(sizes, device=self.device, dtype=self.dtype)

    def single(self, *sizes: int) -> Tensor:
        """The same in float32."""
        return torch.randn(sizes, device=self.device)

    def frozen(self, norm: Norm) -> Norm:
        """A norm with an affine map that does not train."""
        norm = norm.to(self.device, self.dtype).requires_grad_(False)
        norm.weight.normal_().add_(1.0)
        norm.bias.normal_()
        return norm


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    kernel: str
    net: str  # family and batch
    shape: str
    make: Callable[[Draw], Work]


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
    _, *kept = torch.native_layer_norm(x, [width], norm.weight, norm.bias, norm.eps)

    def theirs() -> object:
        given = (dn, x, [width], *kept, norm.weight, None, [True, False, False])
        dx = ATEN.native_layer_norm_backward(*given)[0].add_(residual)
        return dx, F.layer_norm(x, [width], norm.weight, norm.bias)

    ours = partial(layer_norm_backward, dn, x, moments, norm, residual, tail)
    return Work(ours, theirs, 5 * x.nbytes + 8 * rows)


def _map(draw: Draw, batch: int, channels: int, side: int) -> Tensor:
    return draw(batch, side, side, channels).permute(0, 3, 1, 2)


def _group_norm_silu(batch: int, channels: int, side: int, draw: Draw) -> Work:
    x, norm = _map(draw, batch, channels, side), draw.frozen(nn.GroupNorm(GROUPS, channels))
    ours = partial(group_norm_silu, x, norm)
    return Work(ours, lambda: F.silu(norm(x), inplace=True), 2 * x.nbytes)


def _group_norm_silu_backward(batch: int, channels: int, side: int, draw: Draw) -> Work:
    x, da = (_map(draw, batch, channels, side) for _ in range(2))
    norm = draw.frozen(nn.GroupNorm(GROUPS, channels))
    affine, flat = (norm.weight, norm.bias), (batch, channels, side * side, GROUPS)
    group_norm_silu(x, norm)  # loads the kernels
    moments = torch.ops.eri.group_norm_silu(x, *affine, GROUPS, norm.eps, True)[1]
    dense, da_dense = x.contiguous(), da.contiguous()  # channel by channel, as PyTorch reads it
    y, *kept = torch.native_group_norm(dense, *affine, *flat, norm.eps)

    def ours() -> object:
        return torch.ops.eri.group_norm_silu_backward(da, x, moments, *affine, GROUPS, True)

    def theirs() -> object:
        dy = ATEN.silu_backward(da_dense, y)
        given = (dy, dense, *kept, norm.weight, *flat, [True, False, False])
        return ATEN.native_group_norm_backward(*given)[0]

    return Work(ours, theirs, 3 * x.nbytes)


# -------------------------------------------------------------------------- gates and attention


def _geglu(rows: int, width: int, tail: int, draw: Draw) -> Work:
    u = draw(rows, 2 * width)
    return Work(partial(geglu, u, tail), partial(geglu_reference, u), 3 * u.nbytes // 2)


def _geglu_backward(rows: int, width: int, tail: int, draw: Draw) -> Work:
    u, da = draw(rows, 2 * width), draw(rows, width)

    def theirs() -> object:
        return geglu_backward_reference(da, u), geglu_reference(u)

    return Work(partial(geglu_backward, da, u, tail), theirs, 3 * u.nbytes)


def _heads(rows: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """`parts` times `[B, H, T, D]` of rows `[B, T, parts·H·D]`."""
    return rows.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def _words(batch: int, level: Level, draw: Draw) -> Tensor:
    """Keys and values `[B, S, 2·H·D]`, which lie among those of the map's other blocks."""
    wide = draw(batch, level.words, level.together * 2 * level.width)
    return wide[..., : 2 * level.width]


def _cross_attention(batch: int, level: Level, tail: int, draw: Draw) -> Work:
    q, kv = draw(batch, level.tokens, level.width), _words(batch, level, draw)
    split = *_heads(q, 1, level.heads), *_heads(kv, 2, level.heads)
    ours = partial(cross_attention, q, kv, level.heads, tail)
    return Work(ours, lambda: sdpa(*split)[0], 2 * q.nbytes + kv.nbytes)


def _cross_attention_backward(batch: int, level: Level, tail: int, draw: Draw) -> Work:
    q, d_o = (draw(batch, level.tokens, level.width) for _ in range(2))
    kv, dkv = (_words(batch, level, draw) for _ in range(2))
    split = *_heads(q, 1, level.heads), *_heads(kv, 2, level.heads)
    (split_d_o,), (o, kept) = _heads(d_o, 1, level.heads), sdpa(*split)

    def ours() -> object:
        return cross_attention_backward(d_o, q, kv, dkv, level.heads, tail), dkv

    theirs = partial(sdpa_backward, split_d_o, *split, o, kept)
    return Work(ours, theirs, 3 * q.nbytes + 2 * kv.nbytes)


# ----------------------------------------------------------------------------------------- adapters


def _lora_down(  # noqa: PLR0917
    rows: int, width: int, ranks: int, groups: int, has_tail: bool, draw: Draw
) -> Work:
    columns, side_by_side = groups * width, groups * ranks
    wide, down = draw(rows, columns + has_tail * side_by_side), draw(side_by_side, width)
    hidden = wide[:, columns:] if has_tail else draw(rows, side_by_side)
    split, tail = (
        part.unflatten(1, (groups, -1)).transpose(0, 1) for part in (wide[:, :columns], hidden)
    )

    def theirs() -> object:
        if groups == 1:
            return torch.mm(split[0], down.T, out=tail[0])
        return torch.bmm(split, down.unflatten(0, (groups, -1)).mT, out=tail)

    moved = wide[:, :columns].nbytes + down.nbytes + (1 + has_tail) * tail.nbytes
    return Work(partial(lora_down, wide, down, groups, 1.0), theirs, moved)


def _lora_gradient(  # noqa: PLR0917
    rows: int, outputs: int, inputs: int, ranks: int, layers: int, draw: Draw
) -> Work:
    dy, x = draw(rows, layers * outputs), draw(rows, inputs)
    p, h = (draw(rows, layers * ranks) for _ in range(2))
    d_down, d_up = draw.single(layers * ranks, inputs), draw.single(layers, outputs, ranks)

    def theirs() -> object:
        _add_product(d_down[None], p.T[None], x[None])
        dys, hs = (wide.unflatten(1, (layers, -1)).transpose(0, 1) for wide in (dy, h))
        return _add_product(d_up, dys.mT, hs)

    moved = sum(operand.nbytes for operand in (dy, x, p, h, d_down, d_up, d_down, d_up))
    return Work(partial(lora_gradient, dy, x, p, h, d_down, d_up), theirs, moved)


def _add_product(totals: Tensor, a: Tensor, b: Tensor) -> object:
    """totals += a b, in float32."""
    if not totals.is_cuda:
        return totals.baddbmm_(a.float(), b.float())
    if len(totals) > 1:
        return ATEN.baddbmm.dtype_out(totals, a, b, torch.float32, out=totals)
    return ATEN.addmm.dtype_out(totals[0], a[0], b[0], torch.float32, out=totals[0])


def _join_rows(rows: int, width: int, count: int, tail: int, draw: Draw) -> Work:
    parts = [draw(rows, width) for _ in range(count)]
    return Work(
        partial(join_rows, parts, tail), partial(torch.cat, parts, 1), 2 * count * parts[0].nbytes
    )


def _lora_copies(net: Net, draw: Draw) -> Work:
    """A and Bᵀ of all layers, and B of those that do not read words, into rows with gaps."""
    copies, contexts = [], {level.context for level in net.levels}
    for outputs, inputs in net.adapted():
        down, up = draw.single(net.rank, inputs), draw.single(outputs, net.rank)
        copies.append(MatrixCopy(down, draw(net.rank, inputs)))
        copies.append(MatrixCopy(up.T, draw(net.rank, outputs)))
        if inputs not in contexts:
            copies.append(MatrixCopy(up, draw(outputs, 4 * net.rank)[:, : net.rank]))
    sources, targets = ([copy[side] for copy in copies] for side in range(2))
    moved = sum(source.nbytes + target.nbytes for source, target in copies)
    return Work(LoRACopies(copies), partial(torch._foreach_copy_, targets, sources), moved)


def _adamw(parameters: int, draw: Draw) -> Work:
    """Ours: scale, clip, AdamW and zeroes. Gradients are zero from the second time on."""
    master, mean, grad = (draw.single(parameters) for _ in range(3))
    square = draw.single(parameters).square_()
    control = draw.single(CONTROL_SIZE).zero_()
    control[Control.LR], control[Control.STEP], control[Control.SCALE] = 1e-4, 1, 1
    workspace = adamw_workspace(draw.device)
    settings: dict[str, Any] = {"control": control, "workspace": workspace, "max_grad_norm": 1.0}
    ours = partial(adamw_, master, mean, square, grad, **settings)
    parameter = nn.Parameter(draw.single(parameters))
    parameter.grad = draw.single(parameters)
    capturable = draw.device.type == "cuda"
    optimizer = torch.optim.AdamW([parameter], fused=True, capturable=capturable)

    def theirs() -> None:
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        optimizer.step()
        assert parameter.grad is not None
        parameter.grad.zero_()

    return Work(ours, theirs, parameters * ADAMW_BYTES)


# --------------------------------------------------------------------------------------- the table


def cases(nets: dict[str, Net]) -> Iterator[Case]:
    """All of them; those of one net and batch follow each other."""
    for name, net in nets.items():
        for batch in BATCHES[name]:
            for level in net.levels:
                yield from _of_level(f"{name} ×{batch}", net, level, batch)
            for channels, side in net.maps:
                for kernel, make in MAPS.items():
                    shape = f"[{batch}, {channels}, {side}, {side}]"
                    yield Case(
                        kernel, f"{name} ×{batch}", shape, partial(make, batch, channels, side)
                    )
        layers, size = len(net.adapted()), net.parameters()
        yield Case("lora_copies", name, f"{layers} layers", partial(_lora_copies, net))
        yield Case("adamw", name, f"{size} parameters", partial(_adamw, size))


MAPS = {
    "group_norm_silu": _group_norm_silu,
    "group_norm_silu_backward": _group_norm_silu_backward,
}


def _of_level(name: str, net: Net, level: Level, batch: int) -> Iterator[Case]:
    """The kernels of a transformer block, with the tails that it leaves for its projections."""
    rows, words, width, one = batch * level.tokens, batch * level.words, level.width, net.rank
    pairs = 2 * level.together  # of keys and values: layers that read the words at once
    few = f"[{batch}, {level.tokens}, {level.heads}·{width // level.heads}], {level.words} keys"
    table = [
        ("layer_norm", f"[{rows}, {width}]", _layer_norm, rows, width, 3 * one),
        ("add_layer_norm", f"[{rows}, {width}]", _add_layer_norm, rows, width, one),
        ("layer_norm_backward", f"[{rows}, {width}]", _layer_norm_backward, rows, width, one),
        ("geglu", f"[{rows}, 2·{4 * width}]", _geglu, rows, 4 * width, one),
        ("geglu_backward", f"[{rows}, 2·{4 * width}]", _geglu_backward, rows, 4 * width, one),
        ("cross_attention", few, _cross_attention, batch, level, one),
        ("cross_attention_backward", few, _cross_attention_backward, batch, level, one),
        *(
            ("lora_down", f"[{t}, {n}·{of}] to {n}·{to}", _lora_down, t, of, to, n, t == rows)
            for t, of, to, n in (
                *((rows, width, one, 1), (rows, width, 3 * one, 1), (rows, width, one, 3)),
                *((rows, 4 * width, one, 1), (rows, 8 * width, one, 1)),
                *((words, level.context, pairs * one, 1), (words, width, one, pairs)),
            )
        ),
        *(
            ("lora_gradient", f"[{t}, {n}·{out}], {into}", _lora_gradient, t, out, into, one, n)
            for t, out, into, n in (
                *((rows, width, width, 1), (rows, width, width, 3), (rows, 8 * width, width, 1)),
                *((rows, width, 4 * width, 1), (words, width, level.context, pairs)),
            )
        ),
        ("join_rows", f"3 × [{rows}, {width}]", _join_rows, rows, width, 3, 3 * one),
        ("join_rows", f"1 × [{rows}, {width}]", _join_rows, rows, width, 1, one),
    ]
    for kernel, shape, make, *sizes in table:
        yield Case(kernel, name, shape, partial(make, *sizes))


KERNELS = (
    *("layer_norm", "add_layer_norm", "layer_norm_backward", "geglu", "geglu_backward"),
    *("cross_attention", "cross_attention_backward", "lora_down", "lora_gradient", "join_rows"),
    *("group_norm_silu", "group_norm_silu_backward", "lora_copies", "adamw"),
)
"""Every kernel that there is; a test compares them with the operations of the library."""

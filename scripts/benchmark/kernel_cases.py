"""What each of eri's kernels does, what PyTorch does for it, and how many bytes that has to move.

Bytes are those of the operands: what is read counts once and what is written counts once, unless
the algorithm itself needs more, as AdamW, which reads the gradient once for its norm and once for
the update. What a kernel reads twice because it does so counts once. A tail is not counted where it
is left open.

What stands for PyTorch is what its autograd would run: its own operations on results that were kept
from the forward pass where it keeps them, and for several results of one kernel all of them, but no
tails and no second copies.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eri.layers.adamw import CONTROL_SIZE, Control, adamw_, adamw_workspace
from eri.layers.add_maps import add_maps, add_maps_reference
from eri.layers.cross_attention import cross_attention, cross_attention_backward
from eri.layers.group_norm_silu import group_norm_silu_backward, group_norm_silu_forward
from eri.layers.join_rows import join_rows
from eri.layers.lora import MatrixCopy
from eri.layers.lora_copies import LoRACopies
from eri.layers.lora_products import Gradient, Narrow, lora_down, lora_gradient, lora_gradients
from eri.layers.narrow import join_rows_narrow
from eri.layers.sdpa import sdpa, sdpa_backward
from scripts.benchmark.kernel_shapes import BATCHES, Level, Net
from scripts.benchmark.kernel_work import Case, Draw, Work, of_table
from scripts.benchmark.layer_cases import layer_cases
from scripts.benchmark.row_cases import row_cases

__all__ = ["KERNELS", "cases"]

ATEN = torch.ops.aten
GROUPS = 32
Sizes = tuple[int, int, int]  # of a map: samples, channels, side
Layers = tuple[int, int, int]  # outputs, inputs, how many of them side by side
ADAMW_BYTES = 4 * (2 + 3) + 4 * (3 + 1)  # read: the gradient twice, three more; written: all four


# -------------------------------------------------------------------------------------------- maps


def _map(draw: Draw, batch: int, channels: int, side: int) -> Tensor:
    return draw(batch, side, side, channels).permute(0, 3, 1, 2)


def _group_norm_silu(sizes: Sizes, has_row: bool, draw: Draw) -> Work:
    x, norm = _map(draw, *sizes), draw.frozen(nn.GroupNorm(GROUPS, sizes[1]))
    row = draw(*sizes[:2]) if has_row else None
    ours = partial(group_norm_silu_forward, x, norm, row)
    return Work(ours, lambda: F.silu(norm(_with_row(x, row)), inplace=True), 2 * x.nbytes)


def _with_row(x: Tensor, row: Tensor | None) -> Tensor:
    """A map, and what is added to each channel of a sample."""
    return x if row is None else x + row[:, :, None, None]


def _group_norm_silu_backward(sizes: Sizes, has_row: bool, has_map: bool, draw: Draw) -> Work:
    x, da, plus = (_map(draw, *sizes) for _ in range(3))
    norm, row = draw.frozen(nn.GroupNorm(GROUPS, sizes[1])), draw(*sizes[:2])
    row, plus = row if has_row else None, plus if has_map else None
    affine, flat = (norm.weight, norm.bias), (*sizes[:2], sizes[2] ** 2, GROUPS)
    _, moments = group_norm_silu_forward(x, norm, row)
    ours = partial(group_norm_silu_backward, da, x, moments, norm, row, plus)
    # channel by channel, as PyTorch reads it
    dense, da_dense = _with_row(x, row).contiguous(), da.contiguous()
    plus_dense = None if plus is None else plus.contiguous()
    y, *kept = torch.native_group_norm(dense, *affine, *flat, norm.eps)

    def theirs() -> object:
        dy = ATEN.silu_backward(da_dense, y)
        given = (dy, dense, *kept, norm.weight, *flat, [True, False, False])
        dx = ATEN.native_group_norm_backward(*given)[0]
        return dx if plus_dense is None else dx.add_(plus_dense)

    return Work(ours, theirs, (3 + has_map) * x.nbytes)


def _add_maps(sizes: Sizes, draw: Draw) -> Work:
    (y, x), bias = (_map(draw, *sizes) for _ in range(2)), draw(sizes[1])
    return Work(
        partial(add_maps, y, x, bias), partial(add_maps_reference, y, x, bias), 3 * x.nbytes
    )


# --------------------------------------------------------------------------------------- attention


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


def _lora_gradient(rows: int, layers: Layers, ranks: int, draw: Draw) -> Work:
    one = _of_layers(rows, layers, ranks, draw)
    return Work(partial(lora_gradient, *one), partial(_add_gradients, [one]), _moved([one]))


def _lora_gradients(rows: int, groups: Sequence[Layers], ranks: int, draw: Draw) -> Work:
    """Called as it is: its function takes a launch for each where one cannot take them all."""
    pieces = [_of_layers(rows, layers, ranks, draw) for layers in groups]
    lora_gradients(pieces)  # loads the kernels
    ours = partial(torch.ops.eri.lora_gradients, *map(list, zip(*pieces, strict=True)))
    return Work(ours, partial(_add_gradients, pieces), _moved(pieces))


def _of_layers(rows: int, layers: Layers, ranks: int, draw: Draw) -> Gradient:
    outputs, inputs, count = layers
    dy, x = draw(rows, count * outputs), draw(rows, inputs)
    p, h = (draw(rows, count * ranks) for _ in range(2))
    return Gradient(
        dy, x, p, h, draw.single(count * ranks, inputs), draw.single(count, outputs, ranks)
    )


def _moved(pieces: Sequence[Gradient]) -> int:
    """Bytes: all is read, and the sums are written, too."""
    return sum(sum(t.nbytes for t in one) + one.d_down.nbytes + one.d_up.nbytes for one in pieces)


def _add_gradients(pieces: Sequence[Gradient]) -> None:
    for dy, x, p, h, d_down, d_up in pieces:
        _add_product(d_down[None], p.T[None], x[None])
        dys, hs = (wide.unflatten(1, (len(d_up), -1)).transpose(0, 1) for wide in (dy, h))
        _add_product(d_up, dys.mT, hs)


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


def _join_rows_narrow(rows: int, width: int, count: int, ranks: int, draw: Draw) -> Work:
    """Called as it is, too."""
    parts, down = [draw(rows, width) for _ in range(count)], draw(count * ranks, width)
    join_rows_narrow(parts, Narrow(down, count, 1.0))  # loads the kernels
    ours = partial(torch.ops.eri.join_rows_narrow, *[*parts, None, None][:3], down, 1.0)

    def theirs() -> object:
        joined = torch.cat(parts, 1)
        split = joined.unflatten(1, (count, -1)).transpose(0, 1)
        return joined, torch.bmm(split, down.unflatten(0, (count, -1)).mT)

    moved = 2 * count * parts[0].nbytes + down.nbytes
    return Work(ours, theirs, moved + 2 * rows * len(down) * down.element_size())


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
    for net_name, net in nets.items():
        for batch in BATCHES[net_name]:
            name = f"{net_name} ×{batch}"
            for level in net.levels:
                yield from row_cases(name, net, level, batch)
                yield from _of_level(name, net, level, batch)
                yield from layer_cases(name, level, batch)
            yield from _of_maps(name, net, batch)
        layers, size = len(net.adapted()), net.parameters()
        yield Case("lora_copies", net_name, f"{layers} layers", partial(_lora_copies, net))
        yield Case("adamw", net_name, f"{size} parameters", partial(_adamw, size))


def _of_maps(name: str, net: Net, batch: int) -> Iterator[Case]:
    """The kernels of residual blocks, of what they read and of what they give."""
    kernels = [(sizes, kernel) for sizes in net.maps for kernel in OF_MAPS]
    kernels += [(sizes, kernel) for sizes in net.sums for kernel in OF_SUMS]
    for (channels, side), (kernel, more, make, *options) in kernels:
        shape = f"[{batch}, {channels}, {side}, {side}]{more}"
        yield Case(kernel, name, shape, partial(make, (batch, channels, side), *options))


OF_MAPS = (
    ("group_norm_silu", "", _group_norm_silu, False),
    ("group_norm_silu_backward", "", _group_norm_silu_backward, False, False),
)
OF_SUMS = (
    ("group_norm_silu", " + row", _group_norm_silu, True),
    ("group_norm_silu_backward", " + row", _group_norm_silu_backward, True, False),
    ("group_norm_silu_backward", " + map", _group_norm_silu_backward, False, True),
    ("add_maps", "", _add_maps),
)


def _of_level(name: str, net: Net, level: Level, batch: int) -> Iterator[Case]:
    """Attention to words and the adapters of a transformer block."""
    rows, words, width, one = batch * level.tokens, batch * level.words, level.width, net.rank
    pairs = 2 * level.together  # of keys and values: layers that read the words at once
    layers = (width, width, 3), *[(width, width, 1)] * 3
    few = f"[{batch}, {level.tokens}, {level.heads}·{width // level.heads}], {level.words} keys"
    table = [
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
            ("lora_gradient", f"[{t}, {n}·{out}], {into}", _lora_gradient, t, (out, into, n), one)
            for t, out, into, n in (
                *((rows, width, width, 1), (rows, width, width, 3), (rows, 8 * width, width, 1)),
                *((rows, width, 4 * width, 1), (words, width, level.context, pairs)),
            )
        ),
        ("lora_gradients", f"[{rows}, {width}], 4 of them", _lora_gradients, rows, layers, one),
        ("join_rows", f"3 × [{rows}, {width}]", _join_rows, rows, width, 3, 3 * one),
        ("join_rows", f"1 × [{rows}, {width}]", _join_rows, rows, width, 1, one),
        *(
            ("join_rows_narrow", f"{n} × [{rows}, {width}]", _join_rows_narrow, rows, width, n, one)
            for n in (3, 1)
        ),
    ]
    yield from of_table(name, table)


KERNELS = (
    *("layer_norm", "add_layer_norm", "layer_norm_backward"),
    *("geglu", "geglu_backward", "geglu_backward_lora"),
    *("add_layer_norm_narrow", "layer_norm_backward_narrow"),
    *("cross_attention", "cross_attention_backward", "join_rows", "join_rows_narrow"),
    *("lora_down", "lora_gradient", "lora_gradients"),
    *("scale_rows", "scale_rows_backward", "swiglu", "swiglu_backward", "rope"),
    *("group_norm_silu", "group_norm_silu_backward", "add_maps", "lora_copies", "adamw"),
)
"""Every kernel that there is; a test compares them with the operations of the library."""

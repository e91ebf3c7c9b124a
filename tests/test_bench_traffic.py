"""What scripts/bench counts as read and written: no more and no less than operations must."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from eri.layers import adamw, add_maps, cross_attention, geglu, join_rows, layer_norm, lora_products
from eri.layers.lora import MatrixCopy
from eri.layers.lora_copies import TYPES, _row
from scripts.benchmark import measure
from scripts.benchmark.traffic import bytes_of

REGISTER = adamw, add_maps, cross_attention, geglu, join_rows, layer_norm, lora_products
aten, eri = torch.ops.aten, torch.ops.eri  # the latter as soon as these are imported
X, Y = torch.ones(100), torch.ones(100)  # 400 bytes each
HALF = torch.float16


def moved(work: Callable[[], Any]) -> int:
    return sum(measure.bytes_moved(work).values())


def given(func: Any, args: Sequence[Any], result: Any = None, **kwargs: Any) -> int:
    """What an operation counts that does not run here."""
    return bytes_of(func, args, kwargs, result)


def empty(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def halves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.rand(shape).to(torch.bfloat16) for shape in shapes]


# ------------------------------------------------------------------------------ all operations


def test_bytes_are_those_of_inputs_and_outputs() -> None:
    x, y = X.clone(), Y.clone()
    assert moved(lambda: x + y) == 1200
    assert moved(lambda: x.add_(y)) == 1200
    assert moved(lambda: torch.add(x, y, out=y)) == 1200
    assert moved(lambda: torch.max(x.view(10, 10), 1)) == 400 + 40 + 80
    out = (torch.empty(10), torch.empty(10, dtype=torch.int64))
    assert moved(lambda: torch.max(x.view(10, 10), 1, out=out)) == 400 + 40 + 80
    assert moved(lambda: x.to(HALF)) == 400 + 200
    assert moved(lambda: x[0].item()) == 4
    assert moved(lambda: torch._foreach_add_([x, y], 1.0)) == 1600
    assert moved(lambda: torch._foreach_norm([x, y])) == 800 + 8


def test_the_bytes_of_a_backward_pass_count() -> None:
    w = torch.ones(100, requires_grad=True)
    forward = moved(lambda: (w * 2).sum())
    assert moved(lambda: (w * 2).sum().backward()) > forward + 400


def test_a_tensor_that_is_given_twice_is_read_once() -> None:
    x = X.clone()
    assert moved(lambda: x * x) == 800
    assert moved(lambda: x.mul_(x)) == 800
    assert moved(lambda: x.view(10, 10) * x.view(10, 10)) == 800
    assert moved(lambda: x[:50] * x[50:]) == 600  # not the same numbers
    assert moved(lambda: torch.cat([x, x])) == 400 + 800


def test_an_expanded_tensor_has_what_lies_in_memory() -> None:
    assert moved(lambda: torch.ones(1).expand(100) + X) == 4 + 4 + 400 + 400
    assert moved(lambda: X[:10].expand(10, 10) + X.view(10, 10)) == 40 + 400 + 400
    assert moved(lambda: X.as_strided((98, 3), (1, 1)).clone()) == 400 + 4 * 98 * 3
    assert moved(lambda: X[:1].expand(0).clone()) == 0
    assert moved(lambda: X.view(10, 10)[:, :5].expand(3, 10, 5).clone()) == 200 + 600
    assert moved(lambda: X.view(10, 10)[:, :5].clone()) == 200 + 200
    assert moved(lambda: X.view(10, 10)[:, ::2].clone()) == 200 + 200


def test_what_moves_nothing() -> None:
    x, heads = X.clone(), [torch.rand(2, 3, 4, 8) for _ in range(3)]
    assert moved(lambda: x.view(10, 10).t()) == 0
    assert moved(lambda: x.detach()) == 0
    assert moved(lambda: torch.empty_like(x).resize_(50)) == 0
    assert moved(lambda: x.new_empty(7)) == 0
    assert moved(lambda: aten.lift_fresh(x)) == 0
    assert moved(lambda: torch.empty(0).set_(x.untyped_storage())) == 0
    assert moved(lambda: aten._unsafe_view(x, [10, 10])) == 0
    assert moved(lambda: aten._fused_sdp_choice(*heads)) == 0
    assert given(aten.record_stream.default, (x, None)) == 0


def test_what_is_overwritten_is_not_read() -> None:
    x, y = X.clone(), Y.clone()
    assert moved(lambda: x.zero_()) == 400
    assert moved(lambda: x.fill_(2)) == 400
    assert moved(lambda: x.normal_()) == moved(lambda: x.uniform_()) == 400
    assert moved(lambda: y.copy_(x)) == 800
    assert moved(lambda: torch._foreach_zero_([x, y])) == 800
    assert moved(lambda: torch._foreach_copy_([x], [y])) == 800


def test_of_a_tensor_to_be_like_only_the_shape_is_read() -> None:
    assert moved(lambda: torch.zeros_like(X)) == moved(lambda: torch.ones_like(X)) == 400
    assert moved(lambda: torch.randn_like(X)) == moved(lambda: torch.full_like(X, 2)) == 400
    assert moved(lambda: X.new_zeros(())) == moved(lambda: X.new_full((), 2)) == 4


def test_a_table_is_read_where_it_is_looked_at() -> None:
    table, places = torch.ones(1000, 3), torch.tensor([5, 7])
    assert moved(lambda: table[places]) == 24 + 16 + 24
    assert moved(lambda: table.index_select(0, places)) == 24 + 16 + 24
    assert moved(lambda: functional.embedding(places, table)) == 24 + 16 + 24
    assert moved(lambda: table.gather(0, places[:, None])) == 8 + 16 + 8


# ------------------------------------------------------------------------- products and layers


def test_a_bias_is_read_once_and_a_sum_only_if_it_counts() -> None:
    a, b, bias, total = torch.ones(5, 4), torch.ones(4, 6), torch.ones(6), torch.ones(5, 6)
    product = 4 * (20 + 24 + 30)
    assert moved(lambda: torch.addmm(bias, a, b)) == product + 4 * 6
    assert moved(lambda: total.addmm_(a, b)) == product + 4 * 30
    assert moved(lambda: torch.addmm(total, a, b, beta=0)) == product
    assert moved(lambda: torch.baddbmm(total[None], a[None], b[None], beta=0)) == product
    assert moved(lambda: total.addmm_(a, b, beta=0)) == product


def test_a_convolution_reads_what_its_gradients_need() -> None:
    x, weight, dy = torch.ones(1, 2, 5, 5), torch.ones(3, 2, 1, 1), torch.ones(1, 3, 5, 5)
    settings = [[3], (1, 1), (0, 0), (1, 1), False, (0, 0), 1]

    def of(*mask: bool) -> int:
        return moved(lambda: aten.convolution_backward(dy, x, weight, *settings, mask)) // 4

    assert of(True, False, False) == 75 + 6 + 50
    assert of(False, True, False) == 75 + 50 + 6
    assert of(False, False, True) == 75 + 3
    assert of(True, True, True) == 75 + 50 + 6 + 50 + 6 + 3


def test_the_gradient_of_a_norm_needs_no_bias() -> None:
    dy, x, weight, bias = torch.ones(5, 8), torch.rand(5, 8), torch.ones(8), torch.ones(8)
    _, mean, rstd = torch.native_layer_norm(x, [8], weight, bias, 1e-5)
    args = dy, x, [8], mean, rstd, weight, bias, [True, False, False]
    assert moved(lambda: aten.native_layer_norm_backward(*args)) == 4 * (40 + 40 + 5 + 5 + 8 + 40)


def test_attention_reads_and_writes_all_that_it_is_given() -> None:
    q, k, sums, seed = empty(2, 3, 10, 8), empty(2, 3, 7, 8), empty(2, 3, 10, 1), empty(1)
    few, many, rows = 2 * 336, 2 * 480, 2 * 60  # bytes
    forward = aten._scaled_dot_product_cudnn_attention.default
    result = (q.clone(), sums, None, None, 10, 7, empty(0), empty(0), empty(0))
    assert given(forward, (q, k, k.clone(), None, True), result) == 2 * many + 2 * few + rows
    backward = aten._scaled_dot_product_cudnn_attention_backward.default
    args = (q.clone(), q, k, k.clone(), q.clone(), sums, seed, seed.clone(), None, None, None)
    gradients = (q.clone(), k.clone(), k.clone())
    expected = 4 * many + 4 * few + rows + 4  # dy, q, o, dq; k, v, dk, dv; sums; seeds
    assert given(backward, (*args, 10, 7, 0.0, False), gradients) == expected


def test_keys_and_values_side_by_side_are_both_read() -> None:
    both = empty(2, 7, 3, 16)
    keys, values = both.transpose(1, 2).chunk(2, dim=-1)
    q = empty(2, 3, 10, 8)
    func = aten._scaled_dot_product_cudnn_attention.default
    assert given(func, (q, keys, values, None, False), (q.clone(),)) == 2 * (480 + 672 + 480)


@pytest.mark.parametrize("scaled", [False, True])
def test_fused_adamw_writes_gradients_only_to_unscale_them(scaled: bool) -> None:
    lists = [[torch.ones(100)] for _ in range(4)]
    one, steps = torch.ones(()), [torch.ones(())]
    settings: dict[str, Any] = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0}
    settings |= {"eps": 1e-8, "amsgrad": False, "maximize": False}
    if scaled:
        settings |= {"grad_scale": one, "found_inf": torch.zeros(())}
    expected = 400 * (4 + 3) + 4 + (400 + 8 if scaled else 0)
    assert moved(lambda: aten._fused_adamw_(*lists, [], steps, **settings)) == expected


# ---------------------------------------------------------------------------- eri's own kernels


def test_adamw_reads_the_gradient_twice() -> None:
    master, mean, square, grad, control = *(torch.ones(1000) for _ in range(4)), torch.ones(16)
    work = torch.zeros(0, dtype=torch.uint8)
    settings = (0.9, 0.99, 1e-8, 0.0, 1.0, 0)
    found = moved(lambda: eri.adamw_(master, mean, square, grad, control, work, *settings))
    assert found == 36 * 1000 + 2 * 64  # the control block is read and written


def test_copies_move_what_their_table_says() -> None:
    copies = [
        MatrixCopy(torch.ones(3, 5), torch.ones(3, 5, dtype=torch.bfloat16)),
        MatrixCopy(torch.ones(7, 2), torch.ones(7, 2, dtype=torch.bfloat16)),
    ]
    table = torch.tensor([_row(copy) for copy in copies])
    found = given(eri.lora_copies.default, (table, TYPES[torch.bfloat16]))
    assert found == (15 + 14) * (4 + 2) + 2 * 7 * 8


def test_the_narrow_product_reads_rows_and_writes_behind_them() -> None:
    memory, down = halves((10, 40), (8, 16))
    rows = memory[:, :24]  # 16 numbers and a place for 8
    assert moved(lambda: eri.lora_down(rows, down, 1, 1.0)) == 2 * (160 + 80 + 128 + 80)
    assert moved(lambda: eri.lora_down(rows[:, :16], down, 1, 1.0)) == 2 * (160 + 128 + 80)


def test_gradients_of_matrices_are_added_to() -> None:
    dy, x, p, h = halves((10, 16), (10, 24), (10, 8), (10, 8))
    totals = torch.zeros(8, 24), torch.zeros(1, 16, 8)
    expected = 2 * (160 + 240 + 80 + 80) + 2 * 4 * (192 + 128)
    assert moved(lambda: eri.lora_gradient(dy, x, p, h, *totals)) == expected
    lists = ([one] for one in (dy, x, p, h, *totals))
    assert moved(lambda: eri.lora_gradients(*lists)) == expected


def test_maps_are_added_in_place() -> None:
    y, x = torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    assert moved(lambda: eri.add_maps_(y, x, X[:3])) == 4 * (96 + 96 + 3 + 96)
    assert moved(lambda: eri.add_maps_(y, None, X[:3])) == 4 * (96 + 3 + 96)


def test_gradients_of_keys_are_written_and_not_read() -> None:
    d_o, q, kv, dkv = halves((1, 10, 80), (1, 10, 80), (1, 7, 160), (1, 7, 160))
    dq = moved(lambda: eri.cross_attention_backward(d_o, q, kv, dkv, 2, 0))
    assert dq == 2 * (800 + 800 + 1120 + 1120 + 800)
    with_tail = moved(lambda: eri.cross_attention_backward(d_o, q, kv, dkv, 2, 8))
    assert with_tail == dq


@pytest.mark.parametrize("tail", [0, 8])
def test_tails_are_not_written(tail: int) -> None:
    x, added, u = halves((10, 16), (10, 16), (10, 32))
    q, kv = halves((1, 10, 80), (1, 7, 160))
    (weight,), bias, moments = halves((16,)), torch.zeros(16, dtype=torch.bfloat16), torch.ones(20)
    mean_rstd = moments.view(10, 2)
    norm, one, matrix, statistics = (weight, bias), 2 * 16, 2 * 160, 4 * 20
    assert moved(lambda: eri.join_rows(x, added, None, tail)) == 4 * matrix
    assert moved(lambda: eri.geglu(u, tail)) == 3 * matrix
    assert moved(lambda: eri.geglu_backward(x, u, tail)) == (1 + 2 + 2 + 1) * matrix
    found = moved(lambda: eri.layer_norm(x, *norm, 1e-5, tail))
    assert found == 2 * matrix + 2 * one + statistics
    found = moved(lambda: eri.add_layer_norm(x, added, *norm, 1e-5, tail))
    assert found == 4 * matrix + 2 * one + statistics
    found = moved(lambda: eri.layer_norm_backward(added, x, mean_rstd, *norm, None, tail))
    assert found == 4 * matrix + 2 * one + statistics
    assert moved(lambda: eri.cross_attention(q, kv, 2, tail)) == 2 * (800 + 1120 + 800)

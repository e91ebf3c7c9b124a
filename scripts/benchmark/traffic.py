"""The bytes that an operation must read and write, from its schema and what it was given.

Each number that it reads or writes counts once, whatever caches do. By its schema an operation
reads its arguments and writes its results and what it changes; the tables here say where that is
not so. An operation that is not in them can only count for too much.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from eri.layers.lora_copies import TYPES

# They give memory as it was, or look at shapes and places only.
MOVES_NOTHING = {
    f"aten::{name}"
    for name in (
        *("_fused_sdp_choice", "_unsafe_view", "record_stream", "resize_", "result_type", "set_"),
        *("empty", "empty_like", "empty_permuted", "empty_strided"),
        *("new_empty", "new_empty_strided"),
    )
}
OVERWRITES = (
    *("bernoulli_", "copy_", "exponential_", "fill_", "normal_", "random_", "uniform_", "zero_"),
    *("_foreach_copy_", "_foreach_zero_"),
)
SHAPED_ALIKE = (
    *("full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like"),
    *("new_full", "new_ones", "new_zeros"),
)
# Arguments by operation that are not read, and of those that may be changed, that are not written.
NOT_READ = {f"aten::{name}": {"self"} for name in (*OVERWRITES, *SHAPED_ALIKE)} | {
    "aten::native_layer_norm_backward": {"bias"},
    "eri::cross_attention_backward": {"dkv"},
}
NOT_WRITTEN = {
    "eri::lora_down": {"rows"},  # their ends are, which are not read: each number counts once
}
READ_TWICE = {"eri::adamw_": {"grad"}}  # its norm decides about the update
PICKED = {f"aten::{name}" for name in ("embedding", "gather", "index", "index_select")}
SUMS = {f"aten::{name}" for name in ("addbmm", "addmm", "addmv", "baddbmm")}


def bytes_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """What an operation moves.

    Args:
        func: an overload of an operator.
        args: what it was given.
        kwargs: likewise.
        result: what it gave.
    """
    name, arguments = func._schema.name, func._schema.arguments
    if name in MOVES_NOTHING or _is_view(func):
        return 0
    given = dict(zip((one.name for one in arguments), args, strict=False)) | dict(kwargs)
    if name == "eri::lora_copies":
        return _of_copies(given["table"], given["type"])
    outs = {one.name for one in arguments if one.is_out}
    changed = {one.name for one in arguments if one.alias_info is not None}
    not_read, not_written = outs | _not_read(name, given), _not_written(name, given)
    read = _size(value for key, value in given.items() if key not in not_read)
    if name in PICKED:
        read += _size([result])
    again = _size(given[key] for key in READ_TWICE.get(name, ()))
    written = _size([result, *(given[key] for key in changed - not_written if key in given)])
    return read + again + written - _tail(given, result)


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return any(one.alias_info is not None and not one.alias_info.is_write for one in returns)


def _not_read(name: str, given: Mapping[str, Any]) -> set[str]:
    """Arguments whose numbers are not looked at."""
    if name == "aten::convolution_backward":
        of_input, of_weight, _ = given["output_mask"]
        return ({"input"} if not of_weight else set()) | ({"weight"} if not of_input else set())
    if name.removesuffix("_") in SUMS:
        return {"self"} if given.get("beta", 1) == 0 else set()
    if name in PICKED:
        return {"self", "weight"}  # as much of it as is given
    return NOT_READ.get(name, set())


def _not_written(name: str, given: Mapping[str, Any]) -> set[str]:
    """Arguments that could be changed, and are not."""
    if name == "aten::_fused_adamw_" and given.get("grad_scale") is None:
        return {"grads"}
    return NOT_WRITTEN.get(name, set())


def _tail(given: Mapping[str, Any], result: Any) -> int:
    """Bytes behind the rows of one of eri's results that are left as they were."""
    columns = given.get("tail", 0)
    if not columns:
        return 0
    first = next(_tensors([result]))  # has as many rows as the one with the tail
    return first.shape[0] * columns * first.element_size()


def _of_copies(table: Tensor, kind: int) -> int:
    """Of `eri::lora_copies`, whose table has rows and columns of each copy beside its places."""
    target = next(dtype for dtype, number in TYPES.items() if number == kind)
    numbers = int((table[:, 2] * table[:, 3]).sum())
    return numbers * (4 + target.itemsize) + _size([table])


def _size(values: Iterable[Any]) -> int:
    """Bytes of all tensors in these, each once."""
    once = {_place(tensor): _extent(tensor) for tensor in _tensors(values)}
    return sum(once.values())


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(list(values)) if isinstance(leaf, Tensor))


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors share if they are the same numbers."""
    layout = (tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())
    return tensor.untyped_storage()._cdata, *layout


def _extent(tensor: Tensor) -> int:
    """Bytes in memory: numbers that an expanded or overlapping tensor repeats count once."""
    if tensor.numel() == 0:
        return 0
    sizes = list(zip(tensor.shape, tensor.stride(), strict=True))
    reach = 1 + sum((size - 1) * stride for size, stride in sizes)
    own = 1
    for size, stride in sizes:
        own *= size if stride else 1
    return min(own, reach) * tensor.element_size()

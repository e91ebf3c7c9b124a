"""How many bytes a computation holds, followed tensor by tensor on PyTorch's `meta` device.

Nothing is computed and no memory is taken: tensors there have a shape and a type only. Forward and
backward pass run as they would, so what autograd keeps, what is computed again, and what lives for
a moment only are all counted, each piece of memory once, from its first tensor to its last.

PyTorch works out the shape of a result in Python, which takes longer than many a kernel. A net
repeats its layers, so each kind of call is asked for once and then remembered.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["LiveBytes", "backward", "fused_attention"]


class _Made(NamedTuple):
    """A new tensor."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Given(NamedTuple):
    """An argument that was written to and is returned."""

    place: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors on `meta` that live while it is on.

    Args:
        there: tensors that are there before and do not count.

    Attributes:
        now: bytes.
        peak: the most that they were.
    """

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._there = [tensor.untyped_storage() for tensor in there]  # alive: no other has their id
        self._known: dict[int, object] = {storage._cdata: None for storage in self._there}
        self._views: dict[Any, bool] = {}  # of each operator, whether it gives views
        self._results: dict[Any, tuple[type, list[object]]] = {}  # of each kind of call

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, and count what it makes."""
        result = self._run(func, args, kwargs or {})
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        name, size = storage._cdata, storage.nbytes()
        if name in self._known:
            return

        def gone(_: object) -> None:
            del self._known[name]
            self.now -= size

        self._known[name] = weakref.ref(storage, gone)
        self.now += size

    def _run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._gives_views(func):
            return func(*args, **kwargs)
        given = [*args, *kwargs.values()]
        call = (func, _kind(given), *kwargs)
        known = self._results.get(call)
        if known is None:
            result = _as_on_a_gpu(func, args, func(*args, **kwargs))
            self._results[call] = _recipes(result, given)
            return result
        kind, recipes = known
        results = [_follow(recipe, given) for recipe in recipes]
        return kind(results) if kind in {tuple, list} else results[0]

    def _gives_views(self, func: Any) -> bool:
        """Whether results share memory with arguments that are not written to."""
        if func not in self._views:
            aliases = [argument.alias_info for argument in func._schema.arguments]
            self._views[func] = any(alias and not alias.is_write for alias in aliases)
        return self._views[func]


def _as_on_a_gpu(func: Any, args: tuple, result: Any) -> Any:
    """The result of a convolution as cuDNN lays it out; of others the result itself.

    Pixel by pixel where one of its maps or its weights lies like that. Where `meta` differs, a net
    would be seen to copy what a GPU has in order.
    """
    maps = [x for x in args[:3] if isinstance(x, Tensor) and x.dim() == 4]
    if not func.name().startswith("aten::convolution") or not any(map(_by_pixels, maps)):
        return result
    if isinstance(result, Tensor):
        return result.contiguous(memory_format=torch.channels_last)
    d_input, *others = result
    if d_input is not None:
        d_input = d_input.contiguous(memory_format=torch.channels_last)
    return (d_input, *others)


def _by_pixels(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _kind(value: object) -> object:
    """What of arguments the shapes of the results hang on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(_kind(part) for part in value)
    return type(value), value  # 1, 1.0 and True are equal, and make other types


def _recipes(result: object, given: Sequence[object]) -> tuple[type, list[object]]:
    """How to make such results again."""
    results = result if isinstance(result, tuple | list) else [result]
    return type(result), [_recipe(part, given) for part in results]


def _recipe(result: object, given: Sequence[object]) -> object:
    if not isinstance(result, Tensor):
        return result
    for place, argument in enumerate(given):
        if argument is result:
            return _Given(place)
    return _Made(result.shape, result.stride(), result.dtype)


def _follow(recipe: object, given: Sequence[object]) -> object:
    if isinstance(recipe, _Given):
        return given[recipe.place]
    if isinstance(recipe, _Made):
        return torch.empty_strided(recipe.size, recipe.stride, dtype=recipe.dtype, device="meta")
    return recipe


def backward(loss: Tensor) -> None:
    """Run the backward pass of a loss.

    Given its edge of the graph: given a tensor, PyTorch would leave the modes that are on.
    """
    edge = torch.autograd.graph.get_gradient_edge(loss)
    torch.autograd.backward([edge], [torch.ones((), device="meta")])


@contextmanager
def fused_attention() -> Iterator[None]:
    """Lets attention be counted as fused kernels hold it, whatever this machine would run.

    That is queries, keys, values, output and one number a row, never the scores (Dao et al.,
    arXiv 2205.14135, section 3.1); left alone, `meta` tensors would take the way with scores.
    """
    with _FusedAttention():
        yield


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return func(*args, **(kwargs or {}))

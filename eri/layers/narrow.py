r"""Norms, and joined rows, that make the narrow product of what they write on the way.

$$H = s\,x A^T$$

of their results x, and P of the gradients that they pass on, as `eri.layers.lora_products` has it;
both go behind the rows that they are of, too. The rows are on the chip still: what is saved is that
they are read again, and a launch. The numbers that are multiplied are those that are written, in 16
bits, and sums are float32 in an order that never changes. Gates do it in another way, and backward
alone (`eri.layers.geglu_lora`): their rows are so wide that reading the ranks beside whole ones
takes as long as reading them again.

Source: "down-projection in the producer": Zhu et al., "LoRAFusion", arXiv 2510.00206, section 3.

Limits of the kernels: float16 or bfloat16; of norms, those of `eri.layers.layer_norm`, up to 48
ranks, rows of up to 1280 numbers, which are a sum, or have a residual; of joined rows, those of
`eri.layers.join_rows` and `eri.layers.lora_products`, and a matrix for each part. Whatever else is
asked is made by one kernel after the other. More than 48 ranks a part read its rows once for every
48 of them.

Measured with `pytest -s -m gpu tests/layers/test_narrow.py -k bandwidth`, and of joined rows with
`tests/layers/test_join_rows_narrow.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library

from eri.layers import layer_norm as norms
from eri.layers.backend import kernels_ready
from eri.layers.join_rows import MOST, join_rows
from eri.layers.join_rows import unsupported as unsupported_join
from eri.layers.lora_products import MOST_ROWS, Narrow, lora_down, lora_down_reference
from eri.layers.lora_products import unsupported as unsupported_product
from eri.layers.vectors import aligned_rows

__all__ = ["add_layer_norm_narrow", "join_rows_narrow", "layer_norm_backward_narrow"]

MOST_RANKS = 48  # of a norm
MOST_WIDTH = 1280  # likewise
TYPES = {torch.float16, torch.bfloat16}

LIBRARY = Library("eri", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(
    "add_layer_norm_narrow(Tensor x, Tensor added, Tensor weight, Tensor bias, float eps,"
    " Tensor down, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)
LIBRARY.define(
    "layer_norm_backward_narrow(Tensor dn, Tensor x, Tensor mean_rstd, Tensor weight, Tensor bias,"
    " Tensor residual, Tensor down, float scale) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)
LIBRARY.define(
    "join_rows_narrow(Tensor first, Tensor? second, Tensor? third, Tensor down, float scale)"
    " -> (Tensor, Tensor)",
    tags=TAGS,
)


def _add_layer_norm_narrow(  # noqa: PLR0917 - the signature of the op
    x: Tensor,
    added: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    down: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, n, moments = torch.ops.eri.add_layer_norm(x, added, weight, bias, eps, len(down))
    return total, n, moments, lora_down_reference(n, down, 1, scale)


def _layer_norm_backward_narrow(  # noqa: PLR0917 - the signature of the op
    dn: Tensor,
    x: Tensor,
    mean_rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    down: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = dn, x, mean_rstd, weight, bias, residual
    dx, n = torch.ops.eri.layer_norm_backward(*rows, len(down))
    return dx, n, lora_down_reference(dx, down, 1, scale)


def _join_rows_narrow(
    first: Tensor, second: Tensor | None, third: Tensor | None, down: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    groups = 1 + (second is not None) + (third is not None)
    rows = torch.ops.eri.join_rows(first, second, third, len(down))
    return rows, lora_down_reference(rows, down, groups, scale)


def _register(run: Callable[..., Any]) -> None:
    """The op on the CPU, and what it is traced with."""
    name = run.__name__.removeprefix("_")
    torch.library.impl(LIBRARY, name, "CPU")(run)
    torch.library.register_fake(f"eri::{name}", run, lib=LIBRARY)


_register(_add_layer_norm_narrow)
_register(_layer_norm_backward_narrow)
_register(_join_rows_narrow)


def add_layer_norm_narrow(
    x: Tensor, added: Tensor, norm: nn.LayerNorm, narrow: Narrow | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What `add_layer_norm` gives, and H of the norm `[rows, R]`; None where there is no product.

    Raises:
        ConfigError: the backend is `cuda` and a kernel cannot be used.
    """
    if narrow is not None and _fuses(x, norm, narrow):
        rows = aligned_rows(x), aligned_rows(added.view(x.shape))
        total, *others = torch.ops.eri.add_layer_norm_narrow(
            *rows, norm.weight, norm.bias, norm.eps, narrow.down, narrow.scale
        )
        return total.view(x.shape), *others
    total, n, moments = norms.add_layer_norm(x, added, norm, _tail(narrow))
    return total, n, moments, _then(n, narrow)


def layer_norm_backward_narrow(  # noqa: PLR0917 - the signature of the op
    dn: Tensor,
    x: Tensor,
    mean_rstd: Tensor,
    norm: nn.LayerNorm,
    residual: Tensor,
    narrow: Narrow | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `layer_norm_backward` gives, and P of the gradient of x, likewise."""
    if narrow is not None and _fuses(x, norm, narrow):
        rows = aligned_rows(dn.view(x.shape)), aligned_rows(x), mean_rstd, norm.weight, norm.bias
        added = aligned_rows(residual.view(x.shape))
        return torch.ops.eri.layer_norm_backward_narrow(*rows, added, narrow.down, narrow.scale)
    dx, n = norms.layer_norm_backward(dn, x, mean_rstd, norm, residual, _tail(narrow))
    return dx, n, _then(dx, narrow)


def join_rows_narrow(
    parts: Sequence[Tensor], narrow: Narrow | None
) -> tuple[Tensor, Tensor | None]:
    """One to three of `[T, D]` as `[T, n·D + R]`, and P of them; without a product `[T, n·D]`.

    Args:
        parts: their rows may lie further apart.
        narrow: what they are multiplied with; one kernel does both where its groups are the parts.

    Returns:
        The rows, with P in their tail; P `[T, R]`, or None.

    Raises:
        ConfigError: the backend is `cuda` and a kernel cannot be used.
    """
    if narrow is not None and _joins(parts, narrow):
        first, second, third = [*map(aligned_rows, parts), None, None][:MOST]
        return torch.ops.eri.join_rows_narrow(first, second, third, narrow.down, narrow.scale)
    rows = join_rows(parts, _tail(narrow))
    return rows, _then(rows, narrow)


def _tail(narrow: Narrow | None) -> int:
    return 0 if narrow is None else len(narrow.down)


def _then(rows: Tensor, narrow: Narrow | None) -> Tensor | None:
    return None if narrow is None else lora_down(rows, *narrow)


def _fuses(x: Tensor, norm: nn.LayerNorm, narrow: Narrow) -> bool:
    """Whether one kernel can do both."""
    ranks = len(narrow.down)
    return (
        x.dtype in TYPES
        and x.shape[-1] <= MOST_WIDTH
        and narrow.groups == 1
        and ranks <= MOST_RANKS
        and norms.unsupported(x, norm.weight) is None
        and unsupported_product(ranks, {}, down=narrow.down) is None
        and kernels_ready(x.device)
    )


def _joins(parts: Sequence[Tensor], narrow: Narrow) -> bool:
    """The same of parts that are joined."""
    ranks, side_by_side = len(narrow.down) // narrow.groups, len(narrow.down)
    return (
        parts[0].dtype in TYPES
        and narrow.groups == len(parts)
        and len(parts[0]) < MOST_ROWS
        and unsupported_join(parts, side_by_side) is None
        and unsupported_product(ranks, {}, down=narrow.down) is None
        and kernels_ready(parts[0].device)
    )

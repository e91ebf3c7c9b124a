"""Masks at the size of latents, kept by what they were made from: cut and flipped as their images.

A mask is worked out with its image's own cut and averaged over the area of each latent pixel, so
the weight of a latent pixel is the share of it that is learned.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import interpolate

from eri.data.ahead import ahead
from eri.data.cuts import Cut, fit
from eri.data.entries import key, read_entry, sweep_unfinished, write_entry
from eri.data.images import pillow_warnings_ignored
from eri.data.items import Mask
from eri.data.masks import read_mask

__all__ = ["cache_masks", "mask_in"]

PREPROCESSING = 1
"""Raised when the same bytes come to another mask."""

LatentSize = tuple[int, int]
"""Height and width."""


class _Task(NamedTuple):
    path: Path
    cut: Cut
    mask: Mask
    size: LatentSize


def cache_masks(
    cuts: Sequence[Cut], sizes: Sequence[LatentSize], count: Callable[[int], None]
) -> list[Path | None]:
    """Makes the masks that the cache does not hold yet.

    Args:
        cuts: of checked images.
        sizes: of their latents.
        count: called with the number of cuts whose mask was found or made.

    Returns:
        The entry of each cut's mask, None where all of its image is learned.

    Raises:
        DataError: a mask changed since it was checked.
        DiskError: the cache cannot be written.
    """
    sweep_unfinished("mask")
    tasks = [_task(cut, size) for cut, size in zip(cuts, sizes, strict=True)]
    paths = [task and task.path for task in tasks]
    wanted = {task.path: task for task in tasks if task is not None}
    times = Counter(paths)
    missing: list[_Task] = []
    for path, task in wanted.items():
        if mask_in(path) is None:
            missing.append(task)
        else:
            count(times[path])
    with pillow_warnings_ignored(), ahead(_make, missing) as made:
        for path in made:
            count(times[path])
    return paths


def mask_in(path: Path) -> Tensor | None:
    """The mask in an entry, float32 [1, h, w] in 0..1; None where there is none that is whole."""
    found = read_entry(path)
    if found is None or found.keys() != {"mask"}:
        return None
    return found["mask"]


def _task(cut: Cut, size: LatentSize) -> _Task | None:
    item, view, mask = cut.item, cut.view, cut.item.mask
    if mask is None:
        return None
    place = (view.flip, view.zoom, view.down, view.across)  # no view changes a mask's colors
    made_from = (mask.sha256, mask.alpha, item.width, item.height)
    path = key("mask", *made_from, *cut.shape, *place, *size, PREPROCESSING)
    return _Task(path, cut, mask, size)


def _make(task: _Task) -> Path:
    item = task.cut.item
    whole = read_mask(task.mask, (item.width, item.height))
    pixels = fit(whole, task.cut.shape, task.cut.view).float() / 255
    area = interpolate(pixels[None], size=task.size, mode="area")[0]
    write_entry(task.path, {"mask": area})
    return task.path

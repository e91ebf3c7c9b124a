"""Latents computed once and kept by what they were computed from.

The name of an entry is a hash of the image's bytes, the encoder, the cut and the preprocessing: an
edited image, another VAE or another resolution has another name, and a touched file the same; see
`eri.data.entries`. Source: `z = mean + std · noise` is drawn anew in every epoch, so the mean and
the standard deviation of the posterior are kept (Kingma and Welling 2014).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple, TypeVar

from torch import Tensor

from eri.data.ahead import ahead
from eri.data.cuts import Cut, fit
from eri.data.entries import key, read_entry, sweep_unfinished, write_entry
from eri.data.images import decode_open, hashed_as, pillow_warnings_ignored
from eri.data.items import Progress
from eri.data.mask_cache import cache_masks, mask_in
from eri.data.shapes import Shape
from eri.errors import DataError, NonFiniteError
from eri.printable import printable

__all__ = [
    "Encode",
    "Encoded",
    "Latent",
    "Latents",
    "cache_latents",
    "latent_bytes",
    "missing_latents",
]

Encoded = tuple[Tensor, Tensor, bool]
"""Mean and standard deviation of latents, each [1, C, h, w], and whether they were encoded in
tiles, which gives slightly other numbers."""

Encode = Callable[[Tensor], Encoded]
"""Images [1, 3, H, W] in [-1, 1], float32 on the CPU, to their latents."""

PREPROCESSING = 2
"""Raised when the same bytes come to other pixels: decoding, scaling, cutting."""

Found = TypeVar("Found")

CUTS_AT_ONCE = 8  # of one image, in memory
ENTRY_OVERHEAD = 256  # bytes at most: digest and header


class Latent(NamedTuple):
    """Mean and standard deviation of an image's latent: float32 [C, h, w] on the CPU; and which
    parts of it are learned: float32 [1, h, w] in 0..1, None where all of it is."""

    mean: Tensor
    std: Tensor
    mask: Tensor | None = None


class Latents:
    """The latents of some cuts, in their order, read from the cache when they are asked for.

    Args:
        paths: of the latents' entries.
        masks: of the masks' entries, None where there is none; none at all unless given.
    """

    def __init__(self, paths: Sequence[Path], masks: Sequence[Path | None] | None = None) -> None:
        self.paths = tuple(paths)
        self.masks = (None,) * len(self.paths) if masks is None else tuple(masks)

    def __len__(self) -> int:
        return len(self.paths)

    def masked_out(self) -> list[int]:
        """Which cuts keep nothing of what their mask keeps."""
        return [
            index
            for index, path in enumerate(self.masks)
            if path is not None and not _in_use(path, mask_in(path)).any()
        ]

    def __getitem__(self, index: int) -> Latent:
        path, mask_path = self.paths[index], self.masks[index]
        latent = _in_use(path, _latent_in(path))
        if mask_path is None:
            return latent
        return latent._replace(mask=_in_use(mask_path, mask_in(mask_path)))


def cache_latents(
    cuts: Sequence[Cut], encode: Encode, *, encoder: str, progress: Progress | None = None
) -> Latents:
    """Encodes what the cache does not hold yet and returns the latents of all cuts.

    Images are encoded one at a time, so that an entry never depends on what else was missing; the
    next ones are read meanwhile.

    Args:
        cuts: of checked images; equal ones count once.
        encode: see `Encode`.
        encoder: what identifies the encoder: the hash of its weights and the type it computes in.
        progress: called as latents, and then masks, are found or made.

    Raises:
        DataError: an image or a mask changed since it was checked.
        NonFiniteError: an image has a NaN or an infinity in its latent; names the image.
        DiskError: the cache cannot be written.
    """
    sweep_unfinished("latent")
    masked = sum(cut.item.mask is not None for cut in cuts)
    count = _counter(len(cuts) + masked, progress)
    names = [_entry(cut, encoder) for cut in cuts]
    times = Counter(names)
    wanted = dict(zip(reversed(names), reversed(cuts), strict=True))  # each as it comes first
    kept: dict[Path, _Kept] = {}
    for name in times:
        found = _find(wanted[name], encoder)
        if found is not None:
            kept[name] = found
            count(times[name])
    missing = [wanted[name] for name in times if name not in kept]
    with pillow_warnings_ignored(), ahead(_cut, _by_image(missing)) as images:
        for cut, pixels in chain.from_iterable(images):
            name = _entry(cut, encoder)
            kept[name] = _encode(cut, pixels, encode, encoder)
            count(times[name])
    entries = [kept[name] for name in names]
    masks = cache_masks(cuts, [entry.size for entry in entries], count)
    return Latents([entry.path for entry in entries], masks)


def missing_latents(cuts: Sequence[Cut], encoder: str) -> int:
    """How many latents have no entry yet; what the entries hold is not looked at."""
    ways = {tuple(_entry(cut, encoder, tiled) for tiled in (False, True)) for cut in cuts}
    return sum(not any(path.exists() for path in paths) for paths in ways)


def latent_bytes(shape: Shape, channels: int, factor: int) -> int:
    """The most bytes that the entry of a latent takes.

    Args:
        shape: of the cut.
        channels: of the latent.
        factor: pixels that a latent pixel stands for, along each side.
    """
    numbers = 2 * channels * (shape.height // factor) * (shape.width // factor)
    return 4 * numbers + ENTRY_OVERHEAD


class _Kept(NamedTuple):
    """An entry that is there and whole, and the height and width of its latent."""

    path: Path
    size: tuple[int, int]


def _entry(cut: Cut, encoder: str, tiled: bool = False) -> Path:
    item = cut.item
    how = (PREPROCESSING, "float32", "tiled" if tiled else "whole")
    return key("latent", item.sha256, item.background, *cut.shape, *cut.view, encoder, *how)


def _find(cut: Cut, encoder: str) -> _Kept | None:
    """The entry of the image as a whole, else the one that was encoded in tiles."""
    for tiled in (False, True):
        path = _entry(cut, encoder, tiled)
        latent = _latent_in(path)
        if latent is not None:
            return _kept(path, latent)
    return None


def _kept(path: Path, latent: Latent) -> _Kept:
    height, width = latent.mean.shape[-2:]
    return _Kept(path, (height, width))


def _by_image(cuts: Iterable[Cut]) -> Iterator[list[Cut]]:
    """Cuts in their order, those of one image together as far as it is read once for them."""

    def file(cut: Cut) -> tuple[Path, str, str | None]:
        return cut.item.path, cut.item.sha256, cut.item.background

    for _, same in groupby(cuts, key=file):
        of_image = list(same)
        for start in range(0, len(of_image), CUTS_AT_ONCE):
            yield of_image[start : start + CUTS_AT_ONCE]


def _cut(cuts: Sequence[Cut]) -> list[tuple[Cut, Tensor]]:
    """Some cuts of one image with their pixels: uint8 [3, H, W]."""
    item = cuts[0].item
    with hashed_as(item.path, item.sha256) as file:
        pixels = item.width * item.height
        image = decode_open(file, pixel_cap=pixels, background=item.background).image
    return [(cut, fit(image, cut.shape, cut.view)) for cut in cuts]


def _encode(cut: Cut, pixels: Tensor, encode: Encode, encoder: str) -> _Kept:
    mean, std, tiled = encode(pixels.unsqueeze(0).float() / 127.5 - 1.0)
    latent = Latent(mean[0].float(), std[0].float())
    if not (latent.mean.isfinite().all() and latent.std.isfinite().all()):
        raise NonFiniteError(
            "the VAE gives a NaN or an infinity for this image",
            where=printable(cut.item.path),
            hint="encode in fp32; if it is that already, the VAE or the image is damaged",
        )
    path = _entry(cut, encoder, tiled)
    write_entry(path, {"mean": latent.mean, "std": latent.std})
    return _kept(path, latent)


def _latent_in(path: Path) -> Latent | None:
    found = read_entry(path)
    if found is None or found.keys() != {"mean", "std"}:
        return None
    return Latent(found["mean"], found["std"])


def _in_use(path: Path, found: Found | None) -> Found:
    """What an entry held when the run began."""
    if found is None:
        raise DataError(
            "a cached entry was removed or damaged while it was in use",
            where=printable(path),
            hint="run the same command again; it is computed anew",
        )
    return found


def _counter(total: int, progress: Progress | None) -> Callable[[int], None]:
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    return count

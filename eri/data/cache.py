"""Latents computed once and kept by what they were computed from.

The name of an entry is a hash of the image's bytes, the encoder, the shape and the preprocessing:
an edited image, another VAE or another resolution has another name, and a touched file the same.
An entry carries the hash of its own bytes, because a cut or flipped one can look whole; what does
not match is computed again. Source: `z = mean + std · noise` is drawn anew in every epoch, so the
mean and the standard deviation of the posterior are kept (Kingma and Welling 2014).
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from eri.data.cuts import fit
from eri.data.folder import Item, Progress
from eri.data.images import decode, pillow_warnings_ignored
from eri.data.shapes import Shape
from eri.errors import DataError, DiskError, NonFiniteError
from eri.files import atomic_write, cache_dir, disk_errors
from eri.printable import printable

__all__ = ["Encode", "Latent", "Latents", "cache_latents"]

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images [1, 3, H, W] in [-1, 1], float32 on the CPU, to the mean and the standard deviation of
their latents, each [1, C, h, w]."""

PREPROCESSING = 1
"""Raised when the same bytes come to other pixels: decoding, scaling, cutting."""

DIGEST_BYTES = 32


class Latent(NamedTuple):
    """Mean and standard deviation of an image's latent: float32 [C, h, w] on the CPU."""

    mean: Tensor
    std: Tensor


class Latents:
    """The latents of some items, in their order, read from the cache when they are asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Latent:
        latent = _read(self.paths[index])
        if latent is None:
            raise DataError(
                "a cached latent was removed or damaged while it was in use",
                where=printable(self.paths[index]),
                hint="run the same command again; it is computed anew",
            )
        return latent


def cache_latents(
    items: Sequence[Item],
    shapes: Sequence[Shape],
    encode: Encode,
    *,
    encoder: str,
    progress: Progress | None = None,
) -> Latents:
    """Encodes what the cache does not hold yet and returns the latents of all items.

    Images are encoded one at a time, so that an entry never depends on what else was missing.

    Args:
        items: checked images.
        shapes: the shape that each is cut to.
        encode: see `Encode`.
        encoder: what identifies the encoder: the hash of its weights and the type it computes in.
        progress: called as items are found or encoded.

    Raises:
        DataError: an image changed since it was checked.
        NonFiniteError: an image has a NaN or an infinity in its latent; names the image.
        DiskError: the cache cannot be written.
    """
    folder = cache_dir() / "latents"
    paths = [_entry(folder, *pair, encoder) for pair in zip(items, shapes, strict=True)]
    for done, (item, shape, path) in enumerate(zip(items, shapes, paths, strict=True), start=1):
        if _read(path) is None:
            _write(path, _encode(item, shape, encode))
        if progress is not None:
            progress(done, len(items))
    return Latents(paths)


def _entry(folder: Path, item: Item, shape: Shape, encoder: str) -> Path:
    made_from = [item.sha256, encoder, shape.height, shape.width, PREPROCESSING, "float32"]
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    return folder / key[:2] / f"{key}.latent"


def _encode(item: Item, shape: Shape, encode: Encode) -> Latent:
    with pillow_warnings_ignored():
        image, sha256 = decode(item.path)
    if sha256 != item.sha256:
        what, hint = "the file changed while the images were prepared", "run the command again"
        raise DataError(what, where=printable(item.path), hint=hint)
    pixels = fit(image, shape)
    mean, std = encode(pixels.unsqueeze(0).float() / 127.5 - 1.0)
    latent = Latent(*(_owned(part[0]) for part in (mean, std)))
    if not all(part.isfinite().all() for part in latent):
        raise NonFiniteError(
            "the VAE gives a NaN or an infinity for this image",
            where=printable(item.path),
            hint="encode in fp32; if it is that already, the VAE or the image is damaged",
        )
    return latent


def _owned(part: Tensor) -> Tensor:
    """A copy of its own memory, as a file wants it, whatever the encoder's result is a view of."""
    return part.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)


def _read(path: Path) -> Latent | None:
    """The latent in an entry, or None where there is none that is whole."""
    try:
        with disk_errors(path):
            content = path.read_bytes()
    except DiskError:
        return None
    digest, payload = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != digest:
        return None
    try:
        tensors = load(payload)
        return Latent(tensors["mean"], tensors["std"])
    except (SafetensorError, KeyError):
        return None


def _write(path: Path, latent: Latent) -> None:
    payload = save(latent._asdict())
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(hashlib.sha256(payload).digest() + payload)

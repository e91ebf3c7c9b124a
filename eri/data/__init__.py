"""Folders of images to what the training loop asks for: checked items, shapes, batches, latents."""

from eri.data.batches import Batch, Batches
from eri.data.buckets import (
    Assignment,
    Fitted,
    Geometry,
    Shape,
    assign,
    fit,
    geometry,
    shapes,
    size_ids,
)
from eri.data.cache import Encode, Latent, Latents, cache_latents
from eri.data.folder import Dataset, Item, Progress, scan
from eri.data.images import Decoded, decode

__all__ = [
    "Assignment",
    "Batch",
    "Batches",
    "Dataset",
    "Decoded",
    "Encode",
    "Fitted",
    "Geometry",
    "Item",
    "Latent",
    "Latents",
    "Progress",
    "Shape",
    "assign",
    "cache_latents",
    "decode",
    "fit",
    "geometry",
    "scan",
    "shapes",
    "size_ids",
]

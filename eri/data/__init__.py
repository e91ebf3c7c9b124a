"""Folders of images to what the training loop asks for: checked items, shapes, batches, latents."""

from eri.data.batches import Batch, Batches
from eri.data.cache import Encode, Latent, Latents, cache_latents
from eri.data.cuts import PLAIN, Cut, Geometry, View, fit, geometry, size_ids, views
from eri.data.folder import Dataset, Item, Mask, Progress, scan
from eri.data.images import Decoded, decode
from eri.data.shapes import Assignment, Shape, assign, shapes

__all__ = [
    "PLAIN",
    "Assignment",
    "Batch",
    "Batches",
    "Cut",
    "Dataset",
    "Decoded",
    "Encode",
    "Geometry",
    "Item",
    "Latent",
    "Latents",
    "Mask",
    "Progress",
    "Shape",
    "View",
    "assign",
    "cache_latents",
    "decode",
    "fit",
    "geometry",
    "scan",
    "shapes",
    "size_ids",
    "views",
]

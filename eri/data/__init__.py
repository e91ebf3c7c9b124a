"""Folders of images to what the training loop asks for: checked items, shapes, batches, latents."""

from eri.data.batches import Batch, Batches
from eri.data.cache import Encode, Encoded, Latent, Latents, cache_latents
from eri.data.cuts import PLAIN, Cut, Geometry, View, fit, geometry, size_ids, views
from eri.data.folder import scan
from eri.data.images import Decoded, decode
from eri.data.items import Dataset, Item, Mask, Progress
from eri.data.listing import note
from eri.data.rendering import caption_of, has_unset_trigger, plain_caption, whole_captions
from eri.data.shapes import Assignment, Shape, assign, shapes
from eri.data.texts import Texts, TextStates, cache_texts

__all__ = [
    "PLAIN",
    "Assignment",
    "Batch",
    "Batches",
    "Cut",
    "Dataset",
    "Decoded",
    "Encode",
    "Encoded",
    "Geometry",
    "Item",
    "Latent",
    "Latents",
    "Mask",
    "Progress",
    "Shape",
    "TextStates",
    "Texts",
    "View",
    "assign",
    "cache_latents",
    "cache_texts",
    "caption_of",
    "decode",
    "fit",
    "geometry",
    "has_unset_trigger",
    "note",
    "plain_caption",
    "scan",
    "shapes",
    "size_ids",
    "views",
    "whole_captions",
]

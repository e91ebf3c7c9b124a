"""What a run keeps in the cache, and whether the disk has room for it."""

import shutil
from collections import defaultdict
from dataclasses import dataclass

import torch

from eri.data import Cut, Shape
from eri.data.cache import latent_bytes, missing_latents
from eri.files import cache_dir, disk_errors, require_space
from eri.run.base import LATENT_CHANNELS, BaseFacts
from eri.run.dataset import Images
from eri.run.image_set import ImageSet

__all__ = ["CacheSpace", "cache_space", "latents_made_by", "most_texts"]

STATES = 77  # of a text in one window
BYTES_OF_A_MASK = 4  # a latent pixel


@dataclass(frozen=True)
class CacheSpace:
    """Entries of the cache, and bytes."""

    latents: int  # entries of the run
    missing: int  # of them, not there yet
    texts: int  # at most
    needed: int  # bytes of what is missing, and of all texts while latents are missing
    free: int  # bytes on the disk


def cache_space(
    facts: BaseFacts, images: Images, *, dtype: torch.dtype, device: torch.device
) -> CacheSpace:
    """Count what a run keeps, and what of it the cache has.

    Args:
        facts: of the base model.
        images: checked ones.
        dtype: of the text states.
        device: where images are encoded.

    Raises:
        DiskError: there is no room for what is missing.
    """
    cuts: defaultdict[Shape, list[Cut]] = defaultdict(list)
    distinct = set()  # one entry stands for images that are held out and trained on
    for cut in (*images.train.cuts, *images.validation.cuts):
        cuts[cut.shape].append(cut)
        distinct.add((cut.item.sha256, cut.item.background, cut.shape, cut.view))
    made_by = latents_made_by(facts, device)
    missing, size = 0, 0
    for shape, alike in cuts.items():
        absent = missing_latents(alike, made_by)
        missing += absent
        size += absent * _bytes_of(shape, facts, masked=any(cut.item.mask for cut in alike))
    texts = most_texts(images.train) + most_texts(images.validation)
    spec = facts.spec
    if missing:  # else the texts are most likely there, too
        size += texts * dtype.itemsize * (STATES * spec.context_dim + (spec.pooled_dim or 0))
    folder = cache_dir()
    require_space(folder, size)
    with disk_errors(folder):
        free = shutil.disk_usage(folder).free
    return CacheSpace(len(distinct), missing, texts, size, free)


def latents_made_by(facts: BaseFacts, device: torch.device) -> str:
    """What the latents in the cache hang on beside the image: the VAE and how it computes."""
    arithmetic = "fp32 on the CPU" if device.type == "cpu" else f"TF32 on {device.type}"
    return f"{facts.hashes['vae']} {arithmetic}"


def most_texts(images: ImageSet) -> int:
    """How many different captions some images can have."""
    texts: dict[tuple[int, str], int] = {}
    empty = 0
    for item in images.items:
        rules = images.sources[item.source].caption
        varies = rules.wildcards or rules.shuffle_tags or rules.drop_tags > 0
        empty |= rules.drop > 0
        for caption in item.captions:
            for base in caption.splitlines() if rules.lines else [caption]:
                texts[item.source, base] = rules.variants if varies else 1
    return sum(texts.values()) + empty


def _bytes_of(shape: Shape, facts: BaseFacts, *, masked: bool) -> int:
    size = latent_bytes(shape, LATENT_CHANNELS, facts.latent_factor)
    return size + masked * BYTES_OF_A_MASK * shape.area // facts.latent_factor**2

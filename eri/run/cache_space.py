"""What a run keeps in the cache, and whether the disk has room for it."""

import shutil
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch

from eri.data import Cut, Shape
from eri.data.cache import latent_bytes, missing_latents
from eri.data.texts import missing_texts
from eri.files import cache_dir, disk_errors, require_space
from eri.run.base import LATENT_CHANNELS, BaseFacts
from eri.run.dataset import Images
from eri.run.image_set import ImageSet
from eri.run.samples import Text, by_chance, texts_of

__all__ = [
    "CacheSpace",
    "cache_space",
    "latents_made_by",
    "most_texts",
    "texts_made_by",
]

BYTES_OF_A_MASK = 4  # a latent pixel


@dataclass(frozen=True)
class CacheSpace:
    """Entries of the cache, and bytes."""

    latents: int  # entries of the run
    missing: int  # of them, not there yet
    texts: int  # not there yet, at most
    needed: int  # bytes of what is missing
    free: int  # bytes on the disk

    def require(self) -> None:
        """Refuse to begin what the disk cannot hold.

        Raises:
            DiskError: there is no room for what is missing.
        """
        require_space(cache_dir(), self.needed)


def cache_space(
    facts: BaseFacts,
    images: Images,
    *,
    samples: int,
    drawn: Iterable[Text],
    dtype: torch.dtype,
    device: torch.device,
) -> CacheSpace:
    """Count what a run keeps, and what of it the cache has.

    Args:
        facts: of the base model.
        images: checked ones.
        samples: that the run sees.
        drawn: their captions. Where chance makes captions it takes seconds to draw them, so they
            are only looked at if the disk has too little room for as many as there can be.
        dtype: of the text states.
        device: where images and texts are encoded.
    """
    latents, missing, size = _latents(facts, images, device)
    folder = cache_dir()
    with disk_errors(folder):
        free = shutil.disk_usage(folder).free
    texts = _Texts(facts, images, dtype, device)
    plain, held_out = set(texts_of(images.train)), set(texts_of(images.validation))
    if not by_chance(images.train):
        count, of_texts = texts.missing(plain, held_out)
    else:
        count = min(most_texts(images.train), len(plain) + samples) + len(held_out)
        of_texts = count * texts.bytes_of_one(max(texts.windows))
        if size + of_texts > free:
            count, of_texts = texts.missing(plain.union(drawn), held_out)
    return CacheSpace(latents, missing, count, size + of_texts, free)


def _latents(facts: BaseFacts, images: Images, device: torch.device) -> tuple[int, int, int]:
    """The latents of a run, those that are missing, and the bytes of these."""
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
    return len(distinct), missing, size


@dataclass(frozen=True)
class _Texts:
    """The texts of a run, as the cache keeps them."""

    facts: BaseFacts
    images: Images
    dtype: torch.dtype
    device: torch.device

    @property
    def windows(self) -> tuple[int, int]:
        """In which captions are read: those that are trained on, and those that are held out."""
        train, held_out = self.images.train.windows, self.images.validation.windows
        return train, max(train, held_out)

    def missing(self, texts: Collection[Text], held_out: Collection[Text]) -> tuple[int, int]:
        """How many of all texts of a run are missing, and their bytes."""
        read = dict.fromkeys(
            (windows, text)
            for windows, some in zip(self.windows, (texts, held_out), strict=True)
            for text in some
        )
        alike: defaultdict[tuple[int, bool], list[str]] = defaultdict(list)
        for windows, (text, weighted) in read:
            alike[windows, weighted].append(text)
        count, size = 0, 0
        for (windows, weighted), some in alike.items():
            made_by = texts_made_by(
                self.facts, self.dtype, self.device, windows=windows, weighted=weighted
            )
            absent = len(missing_texts(some, made_by))
            count += absent
            size += absent * self.bytes_of_one(windows)
        return count, size

    def bytes_of_one(self, windows: int) -> int:
        """The states of a text that is read in so many windows."""
        spec, states = self.facts.spec, windows * self.facts.words.tokens
        return self.dtype.itemsize * (states * spec.context_dim + (spec.pooled_dim or 0))


def latents_made_by(facts: BaseFacts, device: torch.device) -> str:
    """What the latents in the cache hang on beside the image: the VAE and how it computes."""
    arithmetic = "fp32 on the CPU" if device.type == "cpu" else f"TF32 on {device.type}"
    return f"{facts.hashes['vae']} {arithmetic}"


def texts_made_by(
    facts: BaseFacts, dtype: torch.dtype, device: torch.device, *, windows: int, weighted: bool
) -> str:
    """What the text states in the cache hang on beside the text: the encoders, and how they read.

    Args:
        facts: of the base model.
        dtype: of the states.
        device: where they are worked out.
        windows: in which the text is read.
        weighted: whether the weights in it count.
    """
    states = facts.words.states
    weights = " ".join(facts.hashes[part] for part in sorted(facts.hashes) if part[:4] == "text")
    return (
        f"{weights} {dtype} on {device.type}, {windows} windows joined as {facts.source.windows}, "
        f"state {states.depth} from the end, normed {states.normed}, "
        f"{'weighted' if weighted else 'literal'}"
    )


def most_texts(images: ImageSet) -> int:
    """How many different captions some images can have."""
    texts: dict[tuple[int, str], int] = {}
    empty = 0
    for item in images.items:
        rules = images.sources[item.source].caption
        empty |= rules.drop > 0
        for caption in item.captions:
            for base in (rules.lines and caption.splitlines()) or [caption]:
                texts[item.source, base] = rules.variants if rules.varies else 1
    return sum(texts.values()) + empty


def _bytes_of(shape: Shape, facts: BaseFacts, *, masked: bool) -> int:
    size = latent_bytes(shape, LATENT_CHANNELS, facts.latent_factor)
    return size + masked * BYTES_OF_A_MASK * shape.area // facts.latent_factor**2

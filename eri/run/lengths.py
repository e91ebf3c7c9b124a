"""Captions that one window of the text encoder does not hold, told before anything is encoded."""

from eri.data import note
from eri.models.text import TextEncoder
from eri.printable import printable
from eri.run.image_set import ImageSet
from eri.run.samples import texts_of

__all__ = ["length_notes"]


def length_notes(images: ImageSet, words: TextEncoder) -> list[str]:
    """Why captions are read in several windows, and which are too long even so.

    Args:
        images: with their captions, of which the plain ones are counted.
        words: counts tokens.
    """
    texts = list(texts_of(images))
    over = [words.tokens_lost(text, weighted=weighted) for text, weighted in texts]
    if not any(over):
        return []
    windows = words.windows_needed([text for text, _ in texts], [mode for _, mode in texts])
    inner, longest = words.tokens - 2, over.index(max(over))
    lost = {
        printable(item.path): words.tokens_lost(text, windows, weighted)
        for item, (text, weighted), more in zip(images.items, texts, over, strict=True)
        if more
    }
    return [
        f"the longest caption has {inner + over[longest]} tokens "
        f"({printable(images.items[longest].path)}); captions are encoded in {windows} windows of "
        f"{words.tokens}",
        *note(
            f"captions with more than the {windows * inner} tokens that the model reads, whose "
            "ends are cut off",
            [f"{name} by {count}" for name, count in lost.items() if count],
        ),
    ]

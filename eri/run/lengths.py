"""How long captions are, and which of them the text encoder does not read to their end."""

from eri.data import note
from eri.models.words import Words
from eri.printable import printable
from eri.run.image_set import ImageSet
from eri.run.samples import whole_texts

__all__ = ["length_notes", "windows_needed"]


def windows_needed(images: ImageSet, words: Words) -> int:
    """The windows of a text encoder that hold the longest caption that any image can have."""
    texts = list(dict.fromkeys(text for _, text in whole_texts(images)))
    return words.windows_needed([text for text, _ in texts], [weighted for _, weighted in texts])


def length_notes(images: ImageSet, words: Words) -> list[str]:
    """Why captions are read in several windows, and which are too long even so.

    Args:
        images: with their captions, and the windows that these need.
        words: counts tokens.
    """
    windows, inner = images.windows, words.tokens - 2
    if windows == 1:
        return []
    over: dict[int, int] = {}  # tokens more than one window holds, by the image
    for index, (text, weighted) in whole_texts(images):
        more = words.tokens_lost(text, weighted=weighted)
        over[index] = max(more, over.get(index, 0))
    longest = max(over, key=lambda index: over[index])
    lost = {index: more - (windows - 1) * inner for index, more in over.items()}
    return [
        f"the longest caption has {inner + over[longest]} tokens "
        f"({printable(images.items[longest].path)}), more than the {inner} of a window; all "
        f"captions are encoded in {windows} windows",
        *note(
            f"captions with more than the {windows * inner} tokens that the model reads, whose "
            "ends are cut off",
            [
                f"{printable(images.items[index].path)} by {count}"
                for index, count in lost.items()
                if count > 0
            ],
        ),
    ]

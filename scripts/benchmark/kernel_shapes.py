"""The sizes at which kernels are timed: what a training step of a family asks of them."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["BATCHES", "NETS", "TINY_NETS", "Level", "Net"]

WORDS = 77
BATCHES = {"sdxl": (4, 1), "sd15": (4,), "tiny": (1,)}  # that are timed of a family


@dataclass(frozen=True)
class Level:
    """Where transformer blocks of one width stand.

    Attributes:
        tokens: of a sample.
        width: of a token.
        heads: of an attention.
        context: width of a word.
        blocks: how many there are in the net.
        transformers: how many modules they are in, each with two projections of its own.
        words: of a prompt.
    """

    tokens: int
    width: int
    heads: int
    context: int
    blocks: int
    transformers: int
    words: int = WORDS

    @property
    def together(self) -> int:
        """Blocks that follow each other, whose keys and values are made at once."""
        return self.blocks // self.transformers

    def adapted(self) -> list[tuple[int, int]]:
        """Outputs and inputs of every adapted layer."""
        width, context = self.width, self.context
        block = [(width, width)] * 6 + [(width, context)] * 2
        block += [(8 * width, width), (width, 4 * width)]
        return block * self.blocks + [(width, width)] * (2 * self.transformers)


@dataclass(frozen=True)
class Net:
    """A family.

    Attributes:
        levels: of its transformers.
        maps: channels and side of what group norms read, concatenated skips among them.
        sums: the same of what residual blocks give.
        rank: of the adapter.
    """

    levels: Sequence[Level]
    maps: Sequence[tuple[int, int]]
    sums: Sequence[tuple[int, int]]
    rank: int = 16

    def adapted(self) -> list[tuple[int, int]]:
        """Outputs and inputs of every adapted layer."""
        return [pair for level in self.levels for pair in level.adapted()]

    def parameters(self) -> int:
        """Of the adapter."""
        return self.rank * sum(map(sum, self.adapted()))


NETS = {
    "sdxl": Net(
        (Level(4096, 640, 10, 2048, 10, 5), Level(1024, 1280, 20, 2048, 60, 6)),
        (
            *((320, 128), (640, 128), (960, 128)),
            *((320, 64), (640, 64), (960, 64), (1280, 64), (1920, 64)),
            *((640, 32), (1280, 32), (1920, 32), (2560, 32)),
        ),
        ((320, 128), (640, 64), (1280, 32)),
    ),
    "sd15": Net(
        (
            Level(4096, 320, 8, 768, 5, 5),
            Level(1024, 640, 8, 768, 5, 5),
            Level(256, 1280, 8, 768, 6, 6),
        ),
        (
            *((320, 64), (640, 64), (960, 64)),
            *((320, 32), (640, 32), (960, 32), (1280, 32), (1920, 32)),
            *((640, 16), (1280, 16), (1920, 16), (2560, 16), (1280, 8), (2560, 8)),
        ),
        ((320, 64), (640, 32), (1280, 16), (1280, 8)),
    ),
}
TINY_NETS = {"tiny": Net((Level(16, 64, 1, 32, 1, 1),), ((32, 8),), ((32, 8),), rank=8)}

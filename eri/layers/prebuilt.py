"""The library of kernels that a wheel brings along, and whether it fits this machine.

`scripts/build-wheel` puts it beside this file with a manifest: its SHA-256, the sources and flags
that it was made of, the cards, CUDA, and the level of PyTorch's stable ABI. A clone has none. It
is trusted as this file is: who can write one can write the other.
"""

import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from eri.errors import EriError
from eri.files import verify_folder
from eri.printable import printable

__all__ = ["LIBRARY", "identity_of", "is_prebuilt", "prebuilt_library", "serves"]

FOLDER = Path(__file__).parent / "kernels"
LIBRARY = "liberi_kernels.so"
KEYS = {"sources", "cards", "cuda", "stable_abi", "machine"}  # of the manifest


def prebuilt_library(capability: tuple[int, int], sources: str) -> Path | str | None:
    """The library that came with this package, for a card.

    Args:
        capability: of the card.
        sources: the hash of the sources and flags that belong to this package.

    Returns:
        Its path, verified; why it cannot be used, in words; None where none came along.
    """
    if not FOLDER.is_dir():
        return None
    try:
        manifest = verify_folder(FOLDER)
    except EriError as error:
        causes = "; ".join([str(error), *error.problems])
        return f"the wheel's kernels are damaged: {causes}; install eri-lora again"
    if LIBRARY not in manifest.files or not KEYS <= manifest.identity.keys():
        return f"the wheel's kernels are damaged: {printable(FOLDER)} does not say what they are"
    return _misfit(manifest.identity, capability, sources) or FOLDER / LIBRARY


def is_prebuilt(library: Path) -> bool:
    """Whether a library is the one that came with this package."""
    return library.parent == FOLDER


def identity_of(
    sources: str, cards: Iterable[str], *, cuda: str, stable_abi: str
) -> dict[str, object]:
    """What the manifest says of a library beside its hash.

    Args:
        sources: the hash of its sources and flags.
        cards: what it has code for, as `serves` reads them.
        cuda: the version of its compiler and runtime, as `13.0`.
        stable_abi: `TORCH_TARGET_VERSION`, as `0x020a000000000000` for PyTorch 2.10.
    """
    return {
        "sources": sources,
        "cards": list(cards),
        "cuda": cuda,
        "stable_abi": stable_abi,
        "machine": platform.machine(),
    }


def serves(card: str, capability: tuple[int, int]) -> bool:
    """Whether code for one card runs on another.

    `86` is machine code for 8.6 and later minors of 8; `90a` for 9.0 alone; `120+PTX` is `120`, and
    an intermediate code that the driver compiles for every later card.
    """
    number, _, ptx = card.partition("+")
    digits = number.rstrip("a")
    major, minor = int(digits[:-1]), int(digits[-1])
    if ptx and capability >= (major, minor):
        return True
    if number != digits:
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


def _misfit(identity: Mapping[str, Any], capability: tuple[int, int], sources: str) -> str | None:
    """Why a whole library does not fit this package, machine, PyTorch or card."""
    if identity["sources"] != sources:
        return "the wheel's kernels are of other sources than those beside them"
    if identity["machine"] != platform.machine():
        return f"the wheel's kernels are for {identity['machine']}, this is {platform.machine()}"
    level = int(identity["stable_abi"], 16) >> 48  # as 0x020a: 2.10
    oldest, found = (level >> 8, level & 0xFF), _numbers(str(torch.__version__))
    if found < oldest:
        return "the wheel's kernels are for PyTorch {}.{} and later, this is {}".format(
            *oldest, printable(str(torch.__version__))
        )
    cuda = torch.version.cuda
    if cuda is not None and _numbers(identity["cuda"])[0] > _numbers(cuda)[0]:
        # a driver that is new enough for PyTorch may be too old for them
        return f"the wheel's kernels are of CUDA {identity['cuda']}, PyTorch of CUDA {cuda}"
    if not any(serves(card, capability) for card in identity["cards"]):
        cards = ", ".join(f"sm_{card}" for card in identity["cards"])
        return "the wheel's kernels are for {}, this card is sm_{}{}".format(cards, *capability)
    return None


def _numbers(version: str) -> tuple[int, int]:
    """(2, 13) of `2.13.0+cu130`."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)

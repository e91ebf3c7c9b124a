"""Work that goes on until it is killed, for sessions of the fork server to call as their hook.

Each says `ready` once it writes, and then a line for whatever it has finished writing.
"""

import hashlib
import itertools
import os
from functools import cache
from pathlib import Path

import torch
from torch import nn

from eri.adapters import Adapter
from eri.files import atomic_write
from eri.formats.adapter_file import Dialect
from eri.layers import LoRALinear
from eri.models.spec import SD15
from eri.run import checkpoints
from eri.run.adapter_files import shapes_of
from eri.run.export import export
from eri.run.saves import Saves
from eri.train import TrainState

__all__ = ["export_forever", "is_whole", "layers", "replace_forever", "save_forever", "small_state"]

MODULES, RANK = 8, 4
KEEP = 2


def replace_forever(path: str, size: int) -> None:
    """Write random bytes behind their own SHA-256 over one file, again and again."""
    for number in itertools.count():
        content = os.urandom(size)
        if number == 0:
            print("ready", flush=True)
        with atomic_write(Path(path)) as file:
            file.write(hashlib.sha256(content).digest())
            file.write(content)
        print(f"saved {number}", flush=True)


def is_whole(path: Path) -> bool:
    """Whether what `replace_forever` wrote is what it meant to write."""
    content = path.read_bytes()
    return hashlib.sha256(content[32:]).digest() == content[:32]


@cache
def layers() -> dict[str, tuple[int, ...]]:
    """The layers of SD1.5, by name."""
    return shapes_of(SD15)


def small_state() -> tuple[TrainState, Adapter]:
    """A state and an adapter of a few modules, without a net."""
    torch.manual_seed(0)
    names = [name for name in layers() if name.endswith("attn1.to_q")][:MODULES]
    adapted = {name: LoRALinear(*reversed(layers()[name]), RANK) for name in names}
    adapter = Adapter(nn.Module(), adapted)
    return TrainState(adapter.flatten()), adapter


def save_forever(run: str) -> None:
    """Go on from the newest checkpoint and save each step, with all numbers being the step."""
    state, adapter = small_state()
    found = checkpoints.newest(Path(run))
    if found is not None:
        checkpoints.load(found, state, adapter, layers())
        if not (state.flat.master == state.step).all():
            print(f"wrong {state.step}", flush=True)
    saves = Saves(
        folder=Path(run),
        keep=KEEP,
        layers=layers(),
        made_with={},
        say=lambda text: print(text, flush=True),
    )
    print("ready", flush=True)
    while True:
        state.step += 1
        with torch.no_grad():
            state.flat.master.fill_(state.step)
            state.flat.exp_avg.fill_(state.step)
        saves.save(state, adapter, identity={}, metadata={})


def export_forever(source: str, output: str, dialect: Dialect) -> None:
    """Export an adapter over the same file, in one type and then in the other."""
    print("ready", flush=True)
    for precision in itertools.cycle(("fp16", "fp32")):
        export(Path(source), Path(output), dialect=dialect, precision=precision, overwrite=True)
        print(f"saved {precision}", flush=True)

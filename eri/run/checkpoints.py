"""The checkpoints of a run: written whole, verified before use, pruned only after the next one."""

import json
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from eri.adapters import Adapter
from eri.errors import ConfigError, EriError, ModelError
from eri.files import commit_folder, verify_folder
from eri.formats.adapter_file import read_adapter, write_adapter
from eri.formats.tensors import load_tensors, save_tensors
from eri.printable import printable
from eri.train import TrainState

__all__ = ["Checkpoint", "load", "newest", "prune", "read", "refuse_changes", "save", "set_aside"]

ADAPTER, OPTIMIZER, STATE = "adapter.safetensors", "optimizer.safetensors", "state.json"
NAME = re.compile(r"checkpoint-\d{6,}")
HASHED = {"images": "the images or their captions", "model": "the weights of the base model"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose files have been verified against its manifest."""

    path: Path
    step: int
    numbers: dict  # of the training state
    identity: dict  # what made the numbers of the run; a resumed run must have the same

    @property
    def adapter(self) -> Path:
        """The adapter file in it."""
        return self.path / ADAPTER


def save(
    run: Path,
    state: TrainState,
    adapter: Adapter,
    *,
    identity: Mapping[str, object],
    metadata: Mapping[str, str],
) -> Path:
    """Write a checkpoint of the state's step, unless one is there already."""
    path = run / f"checkpoint-{state.step:06}"
    if path.exists():
        return path
    with commit_folder(path, identity=identity) as folder:
        write_adapter(
            adapter.pairs(),
            folder / ADAPTER,
            dialect="kohya",
            dtype=torch.float32,
            metadata=metadata,
        )
        save_tensors(state.optimizer_tensors(), folder / OPTIMIZER)
        (folder / STATE).write_text(json.dumps(state.numbers()), encoding="utf-8")
    return path


def set_aside(run: Path, chosen: Checkpoint | None) -> None:
    """Rename the checkpoints that a run does not go on from, so that none is kept over a good one.

    Args:
        run: the run's folder, which the caller has locked.
        chosen: what `newest` found; every newer checkpoint is damaged.

    Raises:
        ModelError: there are checkpoints and none is sound.
    """
    damaged = [path for path in _all(run) if chosen is None or _step(path) > chosen.step]
    if damaged and chosen is None:
        raise ModelError(
            f"none of the {len(damaged)} checkpoints is sound",
            where=printable(run),
            hint="--restart begins anew beside it; the adapters that were saved are untouched",
        )
    for path in damaged:
        path.rename(path.with_name(f"damaged-{path.name}-{secrets.token_hex(2)}"))


def newest(run: Path, say: Callable[[str], None] = lambda text: None) -> Checkpoint | None:
    """The newest checkpoint of a run that verifies; every newer one that does not is named."""
    for path in reversed(_all(run)):
        try:
            return read(path)
        except EriError as error:
            say(f"warning: {path.name} is not used: {error}")
    return None


def read(path: Path) -> Checkpoint:
    """Verify a checkpoint and read its numbers.

    Raises:
        ModelError: a file is missing or differs from the manifest.
    """
    manifest = verify_folder(path)
    try:
        numbers = json.loads((path / STATE).read_text(encoding="utf-8"))
        return Checkpoint(path, int(numbers["step"]), numbers, dict(manifest.identity))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError("the checkpoint's state cannot be read", where=path / STATE) from error


def load(
    checkpoint: Checkpoint,
    state: TrainState,
    adapter: Adapter,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Put a checkpoint into a state and its adapter.

    Args:
        checkpoint: what to load.
        state: of the same parameters.
        adapter: of the same rank and targets.
        shapes: of the base model's layers by name.
    """
    adapter.load_pairs(read_adapter(checkpoint.adapter, shapes).pairs)
    state.load(load_tensors(checkpoint.path / OPTIMIZER), checkpoint.numbers)


def refuse_changes(
    checkpoint: Checkpoint, identity: Mapping[str, object], allowed: frozenset[str]
) -> None:
    """Refuse to go on with settings that would have led elsewhere.

    Raises:
        ConfigError: some differ, and are not in `allowed`.
    """
    before, now = checkpoint.identity, json.loads(json.dumps(dict(identity)))
    unknown = allowed - before.keys() - now.keys()
    if unknown:
        raise ConfigError(
            f"--allow-change {sorted(unknown)[0]}: no such setting",
            hint=f"allowed: {', '.join(sorted(before.keys() | now.keys()))}",
        )
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in allowed
    ]
    if changed:
        allow = " ".join(f"--allow-change {key}" for key in changed)
        raise ConfigError(
            f"what made this run has changed since {checkpoint.path.name}",
            where=printable(checkpoint.path.parent),
            hint=f"put it back, or --restart for a new run, or {allow}",
            problems=[_difference(key, before.get(key), now.get(key)) for key in changed],
        )


def _difference(key: str, before: object, now: object) -> str:
    if key in HASHED:
        return f"{key}: {HASHED[key]}"
    return f"{key}: {before!r} before, {now!r} now"


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest checkpoints; adapters are never deleted."""
    for path in _all(run)[:-keep]:
        shutil.rmtree(path)


def _all(run: Path) -> list[Path]:
    """Every checkpoint folder of a run, oldest step first."""
    found = [path for path in run.glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])

"""The checkpoints of a run: written whole, verified before use, pruned only after the next one."""

import json
import math
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from eri.adapters import Adapter
from eri.errors import ConfigError, EriError, ModelError, NonFiniteError
from eri.files import commit_folder, remove_folder, require_space, verify_folder
from eri.formats.adapter_file import read_adapter, write_adapter
from eri.formats.tensors import cast, load_tensors, save_tensors
from eri.printable import printable
from eri.train import TrainState

__all__ = [
    "Checkpoint",
    "load",
    "newest",
    "prune",
    "read",
    "refuse_changes",
    "save",
    "set_aside",
    "space_needed",
]

ADAPTER, OPTIMIZER, STATE = "adapter.safetensors", "optimizer.safetensors", "state.json"
MADE_WITH = "made with"  # in a manifest's identity
TOLD_ONLY = {"python", "safetensors"}  # of what a checkpoint was made with; they make no number
BYTES_OF_A_STATE = 12  # of a trained number: itself and AdamW's two moments, in float32
BYTES_OF_AN_ADAPTER = 2  # of a trained number, in float16
BYTES_BESIDE = 300_000  # headers, numbers and the manifest of a checkpoint and an adapter, at most
NAME = re.compile(r"checkpoint-\d{6,}")
STEPS = "train.steps"  # told where the rate hangs on it: where train.schedule is not constant
HASHED = {"images": "the images or their captions", "model": "the weights of the base model"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose files have been verified against its manifest."""

    path: Path
    step: int
    numbers: dict  # of the training state
    identity: dict  # what made the numbers of the run; a resumed run must have the same
    made_with: dict = field(default_factory=dict)  # versions, threads and the device, by name

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
    made_with: Mapping[str, object] | None = None,
) -> bool:
    """Write a checkpoint of the state's step.

    Args:
        run: the run's folder, which the caller has locked.
        state: what is saved.
        adapter: of the state's parameters.
        identity: what made its numbers.
        metadata: text for the adapter's header.
        made_with: what the numbers were computed with; see `eri.run.identity.made_with`.

    Returns:
        Whether one was written; False where the step has one already.

    Raises:
        DiskError: the disk has not the room for it and the adapter that goes with it.
        NonFiniteError: something in the state is NaN or infinite; nothing is written.
    """
    path = run / f"checkpoint-{state.step:06}"
    if path.exists():
        return False
    numbers = state.numbers()
    _require_finite(numbers)
    require_space(run, space_needed(state.flat.master.numel(), saves=1, keep=1))
    whole = dict(identity) | {MADE_WITH: dict(made_with or {})}
    with commit_folder(path, identity=whole) as folder:
        write_adapter(
            adapter.pairs(),
            folder / ADAPTER,
            dialect="kohya",
            dtype=torch.float32,
            metadata=metadata,
        )
        save_tensors(cast(state.optimizer_tensors(), torch.float32), folder / OPTIMIZER)
        (folder / STATE).write_text(json.dumps(numbers), encoding="utf-8")
    return True


def space_needed(numbers: int, *, saves: int, keep: int) -> int:
    """The bytes that the checkpoints and adapters of a run take at most.

    Args:
        numbers: that are trained.
        saves: still to come; each leaves an adapter for good.
        keep: checkpoints that stay; a new one is written before the oldest goes.
    """
    state = numbers * BYTES_OF_A_STATE + BYTES_BESIDE
    adapter = numbers * BYTES_OF_AN_ADAPTER + BYTES_BESIDE
    return state * min(saves, keep + 1) + adapter * saves


def _require_finite(numbers: Mapping[str, object]) -> None:
    bad = [
        f"{name}: {number}"
        for name, number in numbers.items()
        if isinstance(number, float) and not math.isfinite(number)
    ]
    if bad:
        raise NonFiniteError(
            "the state of the training cannot be saved",
            hint="the last checkpoint is sound: go on from there with a smaller train.lr",
            problems=bad,
        )


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
            say("\n  ".join((f"warning: {path.name} is not used: {error}", *error.problems)))
    return None


def read(path: Path) -> Checkpoint:
    """Verify a checkpoint and read its numbers.

    Raises:
        ModelError: a file is missing or differs from the manifest.
    """
    manifest = verify_folder(path)
    try:
        numbers = json.loads((path / STATE).read_text(encoding="utf-8"))
        if NAME.fullmatch(path.name) and numbers["step"] != _step(path):
            raise ValueError(f"it is of step {numbers['step']}")
        identity = dict(manifest.identity)
        made_with = dict(identity.pop(MADE_WITH, {}))
        return Checkpoint(path, int(numbers["step"]), numbers, identity, made_with)
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        where = printable(path / STATE)
        what = f"the checkpoint's state cannot be used: {printable(str(error))}"
        raise ModelError(what, where=where) from error


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
    checkpoint: Checkpoint,
    identity: Mapping[str, object],
    allowed: frozenset[str],
    *,
    made_with: Mapping[str, object] | None = None,
    exact: bool = False,
) -> list[str]:
    """Refuse to go on with settings that would have led elsewhere.

    Args:
        checkpoint: to go on from.
        identity: what makes the numbers now.
        allowed: keys that may differ.
        made_with: what the numbers are computed with now.
        exact: whether a change of that is refused, too.

    Returns:
        What of `made_with` changed, where that is not refused: the run is no longer the same, bit
        by bit, as one that was never stopped.

    Raises:
        ConfigError: some differ, and are not in `allowed`.
    """
    with_before = {k: v for k, v in checkpoint.made_with.items() if k not in TOLD_ONLY}
    with_now = {key: (made_with or {}).get(key) for key in with_before}
    before, now = checkpoint.identity, json.loads(json.dumps(dict(identity)))
    if exact:
        before, now = before | with_before, now | with_now
    unknown = allowed - before.keys() - now.keys()
    if unknown:
        raise ConfigError(
            f"--allow-change {sorted(unknown)[0]}: no such setting",
            hint=f"allowed: {', '.join(sorted(before.keys() | now.keys()))}",
        )
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and key not in allowed
        and not (key == STEPS and None in (before.get(key), now.get(key)))
    ]
    if changed:
        allow = " ".join(f"--allow-change {key}" for key in changed)
        raise ConfigError(
            f"what made this run has changed since {checkpoint.path.name}",
            where=printable(checkpoint.path.parent),
            hint=f"put it back, or --restart or another output for a new run, or {allow}",
            problems=[_difference(key, before.get(key), now.get(key)) for key in changed],
        )
    return [
        _difference(key, value, with_now[key])
        for key, value in sorted(with_before.items())
        if value != with_now[key]
    ]


def _difference(key: str, before: object, now: object) -> str:
    if key in HASHED:
        return f"{key}: {HASHED[key]}"
    return f"{key}: {before!r} before, {now!r} now"


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest checkpoints; adapters are never deleted."""
    for path in _all(run)[:-keep]:
        remove_folder(path)


def _all(run: Path) -> list[Path]:
    """Every checkpoint folder of a run, oldest step first."""
    found = [path for path in run.glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])

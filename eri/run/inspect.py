"""`eri inspect`: what a file or a folder is, and whether it is sound."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch

from eri.config import load_config
from eri.errors import ModelError
from eri.formats import diffusers_folder
from eri.formats.adapter_file import PEFT_WEIGHTS, LoRAPair, read_adapter
from eri.formats.foreign import foreign_kind
from eri.formats.header import read_header
from eri.formats.single_file import sort_tensors
from eri.formats.strict_json import read_object
from eri.printable import printable
from eri.run import checkpoints
from eri.run.adapter_files import CONFIG, is_finished, layers_in
from eri.run.inspect_base import base_in_file, base_in_folder
from eri.run.validation import FILE as VALIDATION

__all__ = ["as_json", "as_text", "inspect_path"]

Facts = dict[str, Any]

GROUPED = 10**5  # a number with so many digits is easier to read in groups of them
ON_ONE_LINE = 60  # characters of a list


def inspect_path(target: Path) -> Facts:
    """Find out what lies at a path.

    Returns:
        Facts as JSON can hold them; `kind` is `run`, `checkpoint`, `adapter`, `base model`, or
        the parts of one that there are: `U-Net`, `VAE`, `text encoder`.

    Raises:
        ModelError: nothing is there, it is damaged, or it is nothing that eri knows.
    """
    if (target / CONFIG).is_file():
        return _run(target)
    if (target / checkpoints.STATE).is_file():
        return _checkpoint(target)
    if not target.exists():
        if str(target) == "demo":
            return base_in_folder(target)
        raise ModelError(
            "no such file or folder",
            where=printable(target),
            hint="name an adapter, a base model, a run or a checkpoint",
        )
    return _folder(target) if target.is_dir() else _file(target)


def as_json(facts: Facts) -> str:
    """One JSON object; every character outside ASCII is escaped."""
    return json.dumps(facts, indent=1, ensure_ascii=True)


def as_text(facts: Facts, indent: str = "") -> str:
    """Lines of `name: value`, nested facts and long lists indented below their name."""
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", as_text(value, indent + "  ")]
        elif isinstance(value, list) and len(", ".join(map(str, value))) > ON_ONE_LINE:
            lines += [f"{indent}{name}:", *(f"{indent}  {_shown(item)}" for item in value)]
        elif isinstance(value, list):
            lines.append(f"{indent}{name}: {', '.join(map(_shown, value))}")
        else:
            lines.append(f"{indent}{name}: {_shown(value)}")
    return "\n".join(line for line in lines if line)


def _shown(value: Any) -> str:
    """Large numbers in groups of three digits, truth as people say it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= GROUPED else str(value)


def _file(path: Path) -> Facts:
    """An adapter, a base model, or a part of one, told by the names of its tensors."""
    header = read_header(path)
    file = sort_tensors(path, header)
    kind = None if file.has_unet else foreign_kind(header.tensors)
    return _adapter(path) if kind is not None and kind.adapter else base_in_file(file)


def _folder(path: Path) -> Facts:
    if (path / PEFT_WEIGHTS).is_file():
        return _adapter(path)
    if diffusers_folder.is_folder(path) or (path / "config.json").is_file():
        return base_in_folder(path)
    raise ModelError(
        "this folder is nothing that eri knows",
        where=printable(path),
        hint="a run has a config.yaml, a diffusers model a model_index.json, an adapter of PEFT "
        f"an {PEFT_WEIGHTS}",
    )


def _adapter(path: Path) -> Facts:
    adapter = read_adapter(path, layers_in(path))
    pairs = adapter.pairs
    ranks = Counter(pair.down.shape[0] for pair in pairs.values())
    alphas = Counter(pair.alpha for pair in pairs.values())
    dtypes = Counter(str(pair.down.dtype).removeprefix("torch.") for pair in pairs.values())
    return {
        "kind": "adapter",
        "path": printable(path),
        "format": adapter.dialect,
        "family": _family(pairs),
        "modules": len(pairs),
        "matched": f"{len(pairs)} of {len(pairs)} modules",  # else it is refused
        "rank": _most_common(ranks),
        "alpha": _most_common(alphas),
        "dtype": _most_common(dtypes),
        "parameters": sum(p.down.numel() + p.up.numel() for p in pairs.values()),
        "finite": True,  # a file with a NaN or an infinity is refused when it is read
        "empty modules": sum(not p.up.any() or not p.down.any() for p in pairs.values()),
        "norm of ΔW": _norms(pairs),
        "metadata": {printable(k): printable(v) for k, v in adapter.metadata.items()},
    }


def _family(pairs: dict[str, LoRAPair]) -> str:
    """What the width of the text states tells; small models share SD1.5's layout."""
    widths = {pair.down.shape[1] for name, pair in pairs.items() if name.endswith("attn2.to_k")}
    names = {768: "sd15", 1024: "sd21", 2048: "sdxl"}
    return " or ".join(sorted(names.get(width, f"context of width {width}") for width in widths))


def _most_common(values: Counter) -> Any:
    """The value that all share, else each with its count."""
    if len(values) == 1:
        return next(iter(values))
    return {str(value): count for value, count in values.most_common()}


def _norms(pairs: dict[str, LoRAPair]) -> dict[str, float]:
    """Frobenius norm of the update of each stage, ‖(alpha/r)·B·A‖, over all of its modules."""
    squares: dict[str, float] = defaultdict(float)
    for name, pair in pairs.items():
        stage = ".".join(name.split(".")[:2]) if not name.startswith("mid") else "mid"
        down, up = pair.down.double().flatten(1), pair.up.double().flatten(1)
        scale = pair.alpha / down.shape[0]
        # ‖B·A‖² = tr(BᵀB·AAᵀ): r x r instead of the whole weight
        squares[stage] += scale**2 * torch.trace(up.T @ up @ down @ down.T).item()
    return {stage: round(max(value, 0.0) ** 0.5, 6) for stage, value in squares.items()}


def _checkpoint(path: Path) -> Facts:
    checkpoint = checkpoints.read(path)
    return {
        "kind": "checkpoint",
        "path": printable(path),
        "step": checkpoint.step,
        "hashes": "all verified",
        "settings": checkpoint.identity,
        "adapter": _adapter(checkpoint.adapter),
    }


def _run(path: Path) -> Facts:
    warnings: list[str] = []
    config = load_config(path / CONFIG)
    checkpoint = checkpoints.newest(path, warnings.append)
    step = 0 if checkpoint is None else checkpoint.step
    facts: Facts = {
        "kind": "run",
        "path": printable(path),
        "step": step,
        "checkpoint": "none yet" if checkpoint is None else f"{checkpoint.path.name}, verified",
        "last loss": _last_loss(path / "log.jsonl"),
        "next eri train": _what_next(path, checkpoint, config.train.steps),
        "settings": config.model_dump(mode="json"),
    }
    if warnings:
        facts["damaged"] = warnings
    if (path / VALIDATION).is_file():
        facts["held-out loss"] = read_object(path / VALIDATION)
    return facts


def _what_next(path: Path, checkpoint: checkpoints.Checkpoint | None, steps: int | str) -> str:
    if checkpoint is None:
        return "starts from the beginning"
    if steps == "auto" or not is_finished(path, checkpoint, int(steps)):
        return f"goes on from step {checkpoint.step} of {steps}"
    return "says that the run is finished, and trains nothing"


def _last_loss(log: Path) -> float | None:
    try:
        return json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["loss"]
    except (OSError, ValueError, IndexError, KeyError):
        return None

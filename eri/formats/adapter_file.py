"""Adapter files of every dialect, in and out; a file is used whole or not at all."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from eri.errors import ModelError
from eri.files import commit_folder, sha256
from eri.formats import kohya, peft
from eri.formats.header import Header, read_header
from eri.formats.lora_pair import KeyTable, LoRAPair, Part
from eri.formats.strict_json import parse_object, read_object
from eri.formats.tensors import cast, data_sha256, load_tensors, save_tensors
from eri.printable import first_few, printable

__all__ = [
    "PEFT_FILES",
    "AdapterFile",
    "Dialect",
    "LoRAPair",
    "Shapes",
    "implied_shapes",
    "read_adapter",
    "underflow",
    "write_adapter",
]

Dialect = Literal["kohya", "diffusers", "peft"]
Shapes = Mapping[str, tuple[int, ...]]
"""Weight shape of every linear layer and convolution of a net, by our name."""
Found = dict[str, dict[Part, str]]  # key of each part of each module

PEFT_CONFIG, PEFT_WEIGHTS = PEFT_FILES = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_CONFIG = "lora_adapter_metadata"  # of the header's metadata
KEYS: dict[Dialect, Callable[[Sequence[str]], KeyTable]] = {
    "kohya": kohya.keys,
    "diffusers": partial(peft.keys, prefix=peft.DIFFUSERS_PREFIX),
    "peft": partial(peft.keys, prefix=peft.PEFT_PREFIX),
}
PREFIXES: tuple[tuple[str, Dialect], ...] = (
    ("lora_unet_", "kohya"),
    ("lora_te", "kohya"),
    (peft.PEFT_PREFIX, "peft"),
    (peft.DIFFUSERS_PREFIX, "diffusers"),
    ("text_encoder", "diffusers"),
)
FLOATS = ("F64", "F32", "F16", "BF16")
DTYPES: dict[Part, tuple[str, ...]] = {
    "down": FLOATS,
    "up": FLOATS,
    "alpha": (*FLOATS, "I64", "I32"),
}
SHA256, KOHYA_SHA256 = "modelspec.hash_sha256", "sshs_model_hash"  # of the data, in metadata
WRITER = "modelspec.implementation_version"
SHOWN = 5  # problems listed in a message

OTHER_FAMILY = "was it made for another family of models?"
FOREIGN_PARTS = (  # in a key that no module has, what it tells
    ("lora_te", "it adapts the text encoder too; eri adapts the U-Net alone"),
    ("text_encoder", "it adapts the text encoder too; eri adapts the U-Net alone"),
    ("dora_scale", "it is a DoRA; plain LoRA is read"),
    ("lora_magnitude_vector", "it is a DoRA; plain LoRA is read"),
    ("hada_", "it is a LoHa; plain LoRA is read"),
    ("lokr_", "it is a LoKr; plain LoRA is read"),
    ("lora_mid", "it is a LoCon with a Tucker core; plain LoRA is read"),
    ("bundle_emb", "it carries embeddings; plain LoRA is read"),
    ("", OTHER_FAMILY),
)
FOREIGN_PART = re.compile(
    r"\.(?=(lora_|lora\.|alpha$|dora_|hada_|lokr_|oft_|diff(_b)?$|default\.))|_lora\."
)
"""Between the name of a module and what is told of it, in keys of any kind of adapter."""


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """An adapter as it was read: pairs by our module names, and the text of its header."""

    pairs: dict[str, LoRAPair]
    dialect: Dialect
    metadata: dict[str, str]


def read_adapter(path: Path, modules: Shapes) -> AdapterFile:
    """Read an adapter of any dialect for a model.

    Args:
        path: a safetensors file, or a folder of PEFT.
        modules: weight shape of every linear layer and convolution of the model, by our name.

    Raises:
        ModelError: the file is missing, damaged, no adapter, or does not fit the model whole: a
            key without a module, half a pair, a wrong shape or type, a number that is not finite.
            Damaged is also a file of eri's whose data is not what its own header says.
        DiskError: it may not be read.
    """
    file = path / PEFT_WEIGHTS if path.is_dir() else path
    header = read_header(file)
    dialect = _dialect(file, header)
    found = _assign(file, header, KEYS[dialect](list(modules)))
    _require_fit(file, header, found, modules)
    _require_written_bytes(file, header)
    config = _config(file, header, dialect)
    tensors = load_tensors(file)
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        problems = [f"{name}: NaN or infinite" for name in broken]
        whole = sum(not set(broken) & set(parts.values()) for parts in found.values())
        what, hint = "tensors that are not finite", "use another version of it"
        raise _refused(file, what, problems, hint, fit=(whole, len(found)))
    pairs = {
        module: _pair(
            file, config, module, shape, {p: tensors[k] for p, k in found[module].items()}
        )
        for module, shape in modules.items()
        if module in found
    }
    return AdapterFile(pairs=pairs, dialect=dialect, metadata=header.metadata)


def implied_shapes(path: Path, nets: Iterable[Shapes]) -> dict[str, tuple[int, ...]]:
    """The layers of the net that an adapter was made for, for reading it without its base model.

    Args:
        path: a safetensors file, or a folder of PEFT.
        nets: those that may be it. The one that has most of its keys, and of these most of its
            shapes, is it; the first of those that are equal, 1×1 kernels included.

    Returns:
        Every layer of that net. Where a shape is not that of the adapter's matrices, as in a
        narrower net of the same layout, theirs stands in its place.

    Raises:
        ModelError: the file is missing, damaged or no adapter, has a key without a module or half
            a pair.
        DiskError: it may not be read.
    """
    file = path / PEFT_WEIGHTS if path.is_dir() else path
    header = read_header(file)
    net, table = _closest(header, _dialect(file, header), nets)
    found = _assign(file, header, table)
    return dict(net) | {
        module: (
            *header.tensors[parts["up"]].shape[:1],
            *header.tensors[parts["down"]].shape[1:],
        )
        for module, parts in found.items()
        if _misfits(header, parts, net[module])
    }


def write_adapter(
    pairs: Mapping[str, LoRAPair],
    path: Path,
    *,
    dialect: Dialect,
    dtype: torch.dtype = torch.float16,
    metadata: Mapping[str, str],
    modules: Iterable[str] | None = None,
) -> None:
    """Write an adapter: the same bytes for the same pairs, whole or not at all.

    Args:
        pairs: at least one, by our module names.
        path: of a file, replaced when it exists; for PEFT of a folder that does not exist yet.
        dialect: whose names are written.
        dtype: of the matrices.
        metadata: text for the header, which also gets the SHA-256 of the data; kohya's gets none
            where there is no other, for A1111 takes what has any but a family for SD1.
        modules: our names of every linear layer and convolution of the net, for kohya's own names
            of SDXL; None where they are not known: then the file has diffusers' names, with
            underscores, which every reader takes as well.

    Raises:
        NonFiniteError: a number is not finite, or too large for `dtype`.
        OccupiedError: the folder exists.
        DiskError: the disk is full, or the path may not be written.
        ValueError: there are no pairs.
    """
    if not pairs:
        raise ValueError("an adapter without a single pair cannot be written")
    if dialect == "kohya":
        names = None if modules is None else list(modules)
        tensors = cast(kohya.weights(pairs, names), dtype)
        tensors |= cast(kohya.alphas(pairs, names), torch.float32)
        digest = data_sha256(tensors)
        hashes = {KOHYA_SHA256: digest, SHA256: f"0x{digest}"} if metadata else {}
        save_tensors(tensors, path, {**metadata, **hashes})
    elif dialect == "diffusers":
        tensors = cast(peft.weights(pairs, peft.DIFFUSERS_PREFIX), dtype)
        fields = {peft.DIFFUSERS_PREFIX + key: v for key, v in peft.config(pairs).items()}
        text = json.dumps(fields, indent=2, sort_keys=True)
        hashed = {**metadata, SHA256: f"0x{data_sha256(tensors)}", "format": "pt"}
        save_tensors(tensors, path, hashed | {DIFFUSERS_CONFIG: text})
    else:
        tensors = cast(peft.weights(pairs, peft.PEFT_PREFIX), dtype)
        fields = {"peft_type": "LORA", "task_type": None, "inference_mode": True}
        text = json.dumps(fields | peft.config(pairs), indent=2, sort_keys=True)
        with commit_folder(path, identity={"kind": "adapter", "dialect": dialect}) as folder:
            (folder / PEFT_CONFIG).write_text(text, encoding="utf-8")
            hashed = {**metadata, SHA256: f"0x{data_sha256(tensors)}", "format": "pt"}
            save_tensors(tensors, folder / PEFT_WEIGHTS, hashed)


def underflow(pairs: Mapping[str, LoRAPair], dtype: torch.dtype) -> float:
    """The share of the numbers of an adapter, from 0 to 1, that become zero in `dtype`."""
    lost = total = 0
    for pair in pairs.values():
        for matrix in (pair.down, pair.up):
            lost += int(((matrix != 0) & (matrix.to(dtype) == 0)).sum())
            total += matrix.numel()
    return lost / max(total, 1)


def _dialect(file: Path, header: Header) -> Dialect:
    for prefix, dialect in PREFIXES:
        if any(name.startswith(prefix) for name in header.tensors):
            return dialect
    first = ", ".join(printable(name, limit=60) for name in list(header.tensors)[:SHOWN])
    raise ModelError(
        f"this is no adapter of a U-Net: its tensors are {first or 'none'}",
        where=printable(file),
        hint="a file in the names of kohya, diffusers or PEFT is needed",
    )


def _closest(header: Header, dialect: Dialect, nets: Iterable[Shapes]) -> tuple[Shapes, KeyTable]:
    """The net that leaves the fewest keys and then the fewest shapes unexplained, and its keys.

    Of those that are equal it is the one whose very shapes the file has: SD1's projections are 1×1
    convolutions, and where no attention is adapted nothing else tells them from SD2's.
    """
    found: tuple[tuple[int, ...], Shapes, KeyTable] | None = None
    for net in nets:
        table = KEYS[dialect](list(net))
        parts, unknown, _ = _sorted(header, table)
        whole = {module: p for module, p in parts.items() if {"down", "up"} <= p.keys()}
        misfits = sum(bool(_misfits(header, p, net[module])) for module, p in whole.items())
        kernels = {module: header.tensors[p["down"]].shape[1:] for module, p in whole.items()}
        others = sum(kernel != net[module][1:] for module, kernel in kernels.items())
        distance = (len(unknown), misfits, others)
        if found is None or distance < found[0]:
            found = distance, net, table
        if not any(found[0]):
            break
    if found is None:
        raise ValueError("no net is given")
    return found[1:]


def _sorted(header: Header, table: KeyTable) -> tuple[Found, list[str], list[str]]:
    """Key of each part of each module; keys that are no part, and what is there twice."""
    found: Found = {}
    unknown, twice = [], []
    for key in header.tensors:
        if key not in table:
            unknown.append(key)
            continue
        module, part = table[key]
        if part in found.setdefault(module, {}):
            twice.append(f"{key}: the same as {found[module][part]}")
        found[module][part] = key
    return found, unknown, twice


def _assign(file: Path, header: Header, table: KeyTable) -> Found:
    """Key of each part of each module; every key of the file is some part, and both halves are."""
    found, unknown, twice = _sorted(header, table)
    if unknown:
        hint = next(hint for part, hint in FOREIGN_PARTS if any(part in key for key in unknown))
        known, others = _modules(header.tensors.keys() & table.keys()), _modules(unknown)
        what = "keys that belong to no module of this model"
        raise _refused(file, what, unknown, hint, fit=(len(known - others), len(known | others)))
    half = [
        f"{next(iter(parts.values()))}: its {part} matrix is missing"
        for parts in found.values()
        for part in ("down", "up")
        if part not in parts
    ]
    if twice or half:
        places = Counter(table[key] for key in header.tensors)
        whole = {module for module, parts in found.items() if {"down", "up"} <= parts.keys()}
        whole -= {module for (module, _), count in places.items() if count > 1}
        fit, hint = (len(whole), len(found)), "download it again"
        raise _refused(file, "pairs that are not whole", twice + half, hint, fit=fit)
    return found


def _modules(keys: Iterable[str]) -> set[str]:
    """The modules that keys of any kind of adapter are about, by the file's own names."""
    return {FOREIGN_PART.split(key, maxsplit=1)[0] for key in keys}


def _require_fit(file: Path, header: Header, found: Found, modules: Shapes) -> None:
    """Types and shapes, out of the header: nothing is read for a file that does not fit."""
    by_module = [_misfits(header, parts, modules[module]) for module, parts in found.items()]
    if any(by_module):
        what, hint = "tensors that do not fit this model", OTHER_FAMILY
        fit = (by_module.count([]), len(found))
        raise _refused(file, what, list(chain.from_iterable(by_module)), hint, fit=fit)


def _require_written_bytes(file: Path, header: Header) -> None:
    """What eri wrote says what its data is; other programs may keep the text of other numbers.

    kohya's scripts write their own hash when they change such a file, and leave the other.
    """
    metadata = header.metadata
    recorded = metadata.get(KOHYA_SHA256) or metadata.get(SHA256, "").removeprefix("0x")
    ours = metadata.get(WRITER, "").startswith("eri/")
    if ours and recorded and sha256(file, start=header.data_start) != recorded:
        raise ModelError(
            "the data is not what was written: its SHA-256 is not the one in its header",
            where=printable(file),
            hint="it is damaged: copy it again, or export it again from its run",
        )


def _misfits(header: Header, parts: Mapping[Part, str], module: tuple[int, ...]) -> list[str]:
    """What is wrong with the types and the shapes of one module's parts."""
    out, *rest = module
    rank = next(iter(header.tensors[parts["down"]].shape), 0)
    expected: dict[Part, tuple[int, ...]] = {"down": (rank, *rest), "up": (out, rank), "alpha": ()}
    problems = []
    for part, key in parts.items():
        info = header.tensors[key]
        if info.dtype not in DTYPES[part]:
            problems.append(f"{key}: {info.dtype}, not one of {', '.join(DTYPES[part])}")
        if rank == 0 or _squeezed(info.shape, part) != _squeezed(expected[part], part):
            problems.append(f"{key}: {list(info.shape)}, the module has {module}")
    return problems


def _squeezed(shape: tuple[int, ...], part: Part) -> tuple[int, ...]:
    """A shape without the sides of one that files write or leave out: 1×1 kernels, [1] for []."""
    optional = (1,) if part == "alpha" else (1, 1)
    kept = 0 if part == "alpha" else 2
    return shape[:kept] if shape[kept:] == optional else shape


def _config(file: Path, header: Header, dialect: Dialect) -> Mapping[str, Any]:
    """The LoraConfig of a file of PEFT or diffusers; empty where there is none."""
    if dialect == "peft":
        return read_object(file.parent / PEFT_CONFIG)
    text = header.metadata.get(DIFFUSERS_CONFIG)
    if dialect == "kohya" or text is None:
        return {}
    try:
        fields = parse_object(text)
    except ValueError as error:
        what = f"{DIFFUSERS_CONFIG} cannot be read: {printable(str(error))}"
        raise ModelError(what, where=printable(file)) from error
    prefix = peft.DIFFUSERS_PREFIX
    return {k.removeprefix(prefix): v for k, v in fields.items() if k.startswith(prefix)}


def _pair(
    file: Path,
    config: Mapping[str, Any],
    module: str,
    shape: tuple[int, ...],
    parts: Mapping[Part, Tensor],
) -> LoRAPair:
    """The parts in the shapes of their module, with the alpha that the file means."""
    rank = parts["down"].shape[0]
    try:
        alpha = float(parts["alpha"]) if "alpha" in parts else peft.alpha(config, module, rank)
    except ValueError as error:
        raise ModelError(printable(str(error)), where=printable(file)) from error
    return LoRAPair(
        down=parts["down"].reshape(rank, *shape[1:]),
        up=parts["up"].reshape(shape[0], rank, *(1 for _ in shape[2:])),
        alpha=alpha,
    )


def _refused(
    file: Path, what: str, problems: Sequence[str], hint: str, *, fit: tuple[int, int]
) -> ModelError:
    fitting, all_modules = fit
    return ModelError(
        f"the adapter has {len(problems)} {what}; {fitting} of its {all_modules} modules fit",
        where=printable(file),
        hint=hint,
        problems=first_few(problems),
    )

"""The cache: one file for each thing that was computed, named by what it was computed from.

The name is a hash of all that the content depends on, so an entry is never stale: another image,
encoder or setting has another name. The content begins with the hash of the rest, because a cut or
flipped file can look whole; what does not match counts as absent and is computed again, so entries
need no flush to the disk. One file each, not many in one: a kill loses at most the entry in flight,
and several runs share the cache without a lock, since two that write one entry write the same.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from eri.errors import DiskError
from eri.files import TEMPORARY_PREFIX, atomic_write, cache_dir, disk_errors

__all__ = ["key", "read_entry", "sweep_unfinished", "write_entry"]

DIGEST_BYTES = 32
UNFINISHED_SECONDS = 24 * 60 * 60
"""How old a half-written file must be to be removed; a younger one may be another run's."""


def key(kind: str, *made_from: object) -> Path:
    """Where the entry made from these values is or would be; its name hashes all of them.

    Args:
        kind: what entries it is one of, "latent"; the folder and the ending of the name.
        made_from: JSON values, all that the content depends on.

    Raises:
        DiskError: the cache folder cannot be used.
    """
    digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    return _folder(kind) / digest[:2] / f"{digest}.{kind}"


def read_entry(path: Path) -> dict[str, Tensor] | None:
    """The tensors of an entry; None where there is none, or none that is whole."""
    try:
        with disk_errors(path):
            content = path.read_bytes()
    except DiskError:
        return None
    digest, payload = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != digest:
        return None
    try:
        return load(payload)
    except SafetensorError:  # whole, but not ours
        return None


def write_entry(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes an entry, whole or not at all.

    Args:
        path: see `key`.
        tensors: of any device and layout; what they are views of is not kept.

    Raises:
        DiskError: the cache cannot be written.
    """
    payload = save({name: _owned(tensor) for name, tensor in tensors.items()})
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, durable=False) as file:
        file.write(hashlib.sha256(payload).digest())
        file.write(payload)


def sweep_unfinished(kind: str) -> None:
    """Removes what killed runs left half-written among the entries of a kind a day ago or before.

    Raises:
        DiskError: the cache cannot be read.
    """
    folder = _folder(kind)
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
        for part in filter(Path.is_dir, folder.iterdir()):
            names = [name for name in os.listdir(part) if name.startswith(TEMPORARY_PREFIX)]
            for name in names:
                _remove_old(part / name)


def _owned(tensor: Tensor) -> Tensor:
    """A copy of its own memory, as a file wants it, whatever the tensor is a view of."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _remove_old(path: Path) -> None:
    with suppress(FileNotFoundError):  # its run finished it, or another one swept it
        if time.time() - path.stat().st_mtime > UNFINISHED_SECONDS:
            path.unlink()


def _folder(kind: str) -> Path:
    return cache_dir() / f"{kind}s"

"""A base model from the Hugging Face Hub: the files that a run needs, and no others.

The files lie in huggingface_hub's own cache, so other programs find them too, and what is there
is used offline. The commit of a branch is noted last, so a download that broke off never stands
in the way of an older, complete copy.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from eri.errors import ModelError
from eri.files import atomic_write, disk_errors, require_space
from eri.formats.diffusers_folder import PICKLES, WEIGHT_FILES, shard_names, weights
from eri.formats.strict_json import read_object
from eri.printable import first_few, printable
from eri.run.hub_client import (
    COMMIT,
    HubId,
    Remote,
    Unreachable,
    cache_dir,
    look_up,
    quiet,
    storage,
)

__all__ = ["HubId", "download", "parse"]

NAME = re.compile(r"[A-Za-z0-9]([\w.-]{0,94}\w)?", re.ASCII)
NOT_IN_A_REVISION = re.compile(r"[\s~^:?*\[\\]|\.\.|@\{")  # the rules of git
PICKLED = tuple(pattern.removeprefix("*") for pattern in PICKLES)
INDEX = "model_index.json"
WEIGHTED = ("text_encoder", "text_encoder_2", "vae", "unet")
PARTS = ("scheduler", "tokenizer", "tokenizer_2", *WEIGHTED)
TOKENIZER_FILE = re.compile(r"tokenizer(_2)?/[A-Za-z0-9_][\w.-]*\.(json|txt)", re.ASCII)


def parse(text: str) -> HubId | None:
    """The hub id `owner/name[@revision]` that `text` is, or None; paths are the caller's to try.

    A name that ends like a file of weights is taken for a mistyped path.
    """
    repo, at, revision = text.partition("@")
    names = repo.split("/")
    if len(names) != 2 or not all(map(NAME.fullmatch, names)):
        return None
    if "--" in repo or ".." in repo or repo.endswith((".git", ".safetensors", *PICKLED)):
        return None
    if not at:
        return HubId(repo)
    return HubId(repo, revision) if _is_revision(revision) else None


def download(hub_id: HubId, say: Callable[[str], None]) -> Path:
    """The local folder of a diffusers model on the Hub, downloaded as far as needed.

    Of each part one set of safetensors weights is taken: the one that is in the cache already,
    else fp16, else the full one. `HF_ENDPOINT`, `HF_HUB_CACHE`, `HF_HOME`, `HF_TOKEN` and
    `HF_HUB_OFFLINE` mean what they mean to huggingface_hub.

    Args:
        hub_id: a commit that is complete in the cache needs no network at all.
        say: called with single lines for people.

    Raises:
        ModelError: it does not exist, may not be read, is no such model, or cannot be reached.
        DiskError: the cache has no space or may not be written.
        ConfigError: `HF_ENDPOINT` or the token cannot be used.
    """
    cache = cache_dir()
    kept = _kept(hub_id, cache)
    lacks = [] if kept is None else _lacks(kept)
    if kept is not None and not lacks and COMMIT.fullmatch(hub_id.revision):
        return kept
    try:
        with quiet():
            return _fetch(hub_id, cache, say)
    except Unreachable as error:
        if kept is not None and not lacks:
            say(f"{hub_id}: {error}; the copy in the cache is used")
            return kept
        copy = "copy of this model" if kept is None else "complete copy of this model"
        what = f"{error}, and the cache has no {copy}"
        raise ModelError(what, where=hub_id, hint=error.hint, problems=lacks) from error


def _fetch(hub_id: HubId, cache: Path, say: Callable[[str], None]) -> Path:
    remote = look_up(hub_id, cache)
    if INDEX not in remote.sizes:
        raise _no_folder(remote)
    remote.get(INDEX)
    small, chosen = _choose(remote)
    for name in small:
        remote.get(name)
    _get_weights(remote, chosen, say)
    if lacks := _lacks(remote.snapshot):
        what = "what the Hub has sent is not complete"
        raise ModelError(what, where=hub_id, hint="try again later", problems=lacks)
    _remember(remote)
    return remote.snapshot


def _choose(remote: Remote) -> tuple[list[str], list[str]]:
    """The small files to get; then the weights, or the index of their shards, of each part."""
    index = read_object(remote.snapshot / INDEX)
    parts = _parts(index, {name.partition("/")[0] for name in remote.sizes})
    if "unet" not in parts:
        raise ModelError(
            f"a {printable(str(index.get('_class_name')))} has no U-Net",
            where=remote.hub_id,
            hint="choose a model of Stable Diffusion 1.5, 2.x or XL",
        )
    small = [name for part in parts for name in _small_files(remote, part)]
    chosen = {part: _choose_weights(remote, part) for part in parts if part in WEIGHTED}
    if without := [part for part, name in chosen.items() if name is None]:
        raise _no_weights(remote, without)
    if missing := [name for name in small if name not in remote.sizes]:
        what = "the repository is not complete"
        raise ModelError(what, where=remote.hub_id, hint="choose another one", problems=missing)
    return small, [name for name in chosen.values() if name is not None]


def _small_files(remote: Remote, part: str) -> list[str]:
    if part == "scheduler":
        return ["scheduler/scheduler_config.json"]
    if part in WEIGHTED:
        return [f"{part}/config.json"]
    files = filter(TOKENIZER_FILE.fullmatch, sorted(remote.sizes))
    return [name for name in files if name.startswith(f"{part}/")]


def _choose_weights(remote: Remote, part: str) -> str | None:
    """The weights of a part that a reader of the snapshot would take, else fp16, else the full.

    A snapshot that another program has begun may hold the index of a full set already; that set is
    then completed, because readers take it before fp16.
    """
    names = [f"{part}/{file}" for file in WEIGHT_FILES if f"{part}/{file}" in remote.sizes]
    begun = [name for name in names if (remote.snapshot / name).is_file()]
    return next(iter(begun or sorted(names, key=lambda name: not _is_half(name))), None)


def _get_weights(remote: Remote, chosen: Sequence[str], say: Callable[[str], None]) -> None:
    """Download weights; shards after the index that names them."""
    names = []
    for name in chosen:
        if not name.endswith(".json"):
            names.append(name)
            continue
        remote.get(name)
        shards = shard_names(remote.snapshot / name)
        names += [str(PurePosixPath(name).with_name(shard)) for shard in shards]
    if missing := [name for name in names if name not in remote.sizes]:
        raise ModelError(
            "the repository does not hold all shards of its weights",
            where=remote.hub_id,
            hint="choose another one",
            problems=first_few(missing),
        )
    wanted = [name for name in names if not remote.has(name)]
    if not wanted:
        return
    size = sum(remote.sizes[name] or 0 for name in wanted)
    require_space(remote.cache, size)
    say(f"downloading {remote.hub_id}: {size / 1e9:.2f} GB into {printable(remote.cache)}")
    if any(map(_is_half, chosen)):
        say("its fp16 weights are taken: half of the download")
    for name in wanted:
        remote.get(name)


def _no_folder(remote: Remote) -> ModelError:
    """Why a repository without model_index.json cannot be used, and what can be done."""
    top = sorted(name for name in remote.sizes if "/" not in name)
    if singles := [name for name in top if name.endswith(".safetensors")]:
        commit = "" if remote.hub_id.revision == "main" else f" --revision {remote.hub_id.revision}"
        by_hand = f"hf download {remote.hub_id.repo} FILE{commit} --local-dir ."
        return ModelError(
            f"this repository holds single files, not a diffusers folder: it has no {INDEX}",
            where=remote.hub_id,
            hint=f"download one and give its path: `{by_hand}`",
            problems=first_few(singles),
        )
    if any(name.endswith(PICKLED) for name in top):
        return _no_weights(remote, [""])
    what = f"this repository has no {INDEX} and no .safetensors file"
    return ModelError(what, where=remote.hub_id, hint="choose a diffusers model")


def _no_weights(remote: Remote, parts: Sequence[str]) -> ModelError:
    """Parts ("" is the top) of which the repository has no safetensors weights."""
    folders = {part or "." for part in parts}
    files = [name for name in sorted(remote.sizes) if str(PurePosixPath(name).parent) in folders]
    if pickles := [name for name in files if name.endswith(PICKLED)]:
        return ModelError(
            "the weights are pickles, which can run code",
            where=remote.hub_id,
            hint="choose a repository or a revision with .safetensors files",
            problems=first_few(pickles),
        )
    what = f"the repository has no weights of {', '.join(parts)}"
    return ModelError(what, where=remote.hub_id, hint="choose another one")


def _kept(hub_id: HubId, cache: Path) -> Path | None:
    """The snapshot of a revision in the cache, complete or not."""
    home = storage(hub_id, cache)
    commit, ref = hub_id.revision, home / "refs" / hub_id.revision
    with disk_errors(ref):
        if not COMMIT.fullmatch(commit):
            commit = ref.read_text(errors="replace").strip() if ref.is_file() else ""
        folder = home / "snapshots" / commit
        return folder if COMMIT.fullmatch(commit) and folder.is_dir() else None


def _remember(remote: Remote) -> None:
    """Note the commit of a branch or tag as huggingface_hub does, for offline runs."""
    if remote.snapshot == _kept(remote.hub_id, remote.cache):
        return
    ref = storage(remote.hub_id, remote.cache) / "refs" / remote.hub_id.revision
    with disk_errors(ref):
        ref.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(ref) as file:
        file.write(remote.commit.encode())


def _lacks(snapshot: Path) -> list[str]:
    """What a snapshot does not hold of its model's parts."""
    try:
        index = read_object(snapshot / INDEX)
    except ModelError as error:
        return [error.what]
    with disk_errors(snapshot):
        parts = _parts(index, [path.name for path in snapshot.iterdir()])
        return [problem for part in parts for problem in _part_lacks(snapshot / part)]


def _part_lacks(folder: Path) -> Iterator[str]:
    names = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    if folder.name.startswith("tokenizer"):
        if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
            yield f"{folder.name}: neither tokenizer.json nor both vocab.json and merges.txt"
        return
    config = "scheduler_config.json" if folder.name == "scheduler" else "config.json"
    if config not in names:
        yield f"{folder.name}: {config} is missing"
    if folder.name in WEIGHTED:
        yield from _weights_lack(folder)


def _weights_lack(folder: Path) -> Iterator[str]:
    try:
        weights(folder)
    except ModelError as error:
        yield f"{folder.name}: {error.what}"


def _parts(index: dict[str, Any], folders: Collection[str]) -> list[str]:
    """The parts of a model: those that its model_index.json names, and those that it passes over
    although their folder is there. A part that a model does without is named with two nulls.
    Every model needs its scheduler's config.
    """
    return [part for part in PARTS if part == "scheduler" or _is_used(part, index, folders)]


def _is_used(part: str, index: dict[str, Any], folders: Collection[str]) -> bool:
    if part not in index:
        return part in folders
    named = index[part]
    return isinstance(named, list) and bool(named) and None not in named


def _is_revision(text: str) -> bool:
    return (
        printable(text) == text
        and not NOT_IN_A_REVISION.search(text)
        and all(
            part and not part.startswith(".") and not part.endswith((".", ".lock"))
            for part in text.split("/")
        )
    )


def _is_half(name: str) -> bool:
    return ".fp16." in name

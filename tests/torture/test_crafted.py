"""Files made to be taken for a model: each is refused with exit code 4, for what it is."""

import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eri.errors import ModelError
from eri.run.inspect import inspect_path
from tests.odd_files import old_pickle, torch_archive
from tests.torture.sessions import ForkServer


class Payload:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.canary),)


def archive(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return stream.getvalue()


def old_torch_tar(canary: Path) -> bytes:
    """What `torch.save` wrote in its first years: a tar archive of pickles."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            info = tarfile.TarInfo(name)
            content = pickle.dumps(Payload(canary))
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def armed_archive(canary: Path) -> bytes:
    """What `torch.save` writes today, with code in it."""
    stream = io.BytesIO()
    torch.save({"state_dict": Payload(canary)}, stream)
    return stream.getvalue()


SCRIPTED = {"m/data.pkl": b"\x80", "m/code/__torch__/m.py": b"", "m/constants.pkl": b"\x80"}
EXPORTED = {"m/models/model.json": b"{}", "m/archive_format": b"pt2"}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
FOREIGN: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "page": (lambda _: b"<!DOCTYPE html><html><body>Log in</body></html>", "a web page"),
    "pointer": (lambda _: POINTER, "a git-lfs pointer"),
    "answer": (lambda _: b'{"error": "Repository not found"}', "a JSON text"),
    "gzip": (lambda _: gzip.compress(bytes(1000)), "a gzip archive"),
    "7z": (lambda _: b"7z\xbc\xaf\x27\x1c" + bytes(60), "a 7z archive"),
    "zip": (lambda _: archive(**{"notes.txt": b"hello"}), "a zip archive, not"),
    "bomb": (lambda _: archive(**{"m/data.pkl": bytes(10**7)}), "a zip archive of torch.save"),
    "gguf": (lambda _: b"GGUF" + bytes(60), "a GGUF file"),
    "ckpt": (lambda _: torch_archive(), "a zip archive of torch.save"),
    "armed ckpt": (armed_archive, "a zip archive of torch.save"),
    "old ckpt": (lambda _: old_pickle(), "a pickle"),
    "armed pickle": (lambda canary: pickle.dumps(Payload(canary)), "a pickle"),
    "tar": (old_torch_tar, "a tar archive"),
    "torchscript": (lambda _: archive(**SCRIPTED), "a program of TorchScript"),
    "pt2": (lambda _: archive(**EXPORTED), "a program of torch.export"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_refused_for_what_it_is(
    tmp_path: Path, server: ForkServer, name: str
) -> None:
    make, found = FOREIGN[name]
    path = tmp_path / "model.safetensors"  # renamed, as people do
    path.write_bytes(make(tmp_path / "canary"))
    before = path.read_bytes()
    ended = server.start("inspect", path, folder=tmp_path / "said").wait()
    assert (ended.code, ended.out) == (4, "")
    error, hint = ended.err.splitlines()
    assert error.startswith(f"eri: error: this is {found}") and str(path) in error
    assert hint.startswith("hint: ")
    assert path.read_bytes() == before
    assert not (tmp_path / "canary").exists()


def test_the_armed_files_are_armed(tmp_path: Path) -> None:
    """Control: unpickled as others would, the payload acts."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "canary")))
    assert (tmp_path / "canary").is_dir()
    assert b"mkdir" in armed_archive(tmp_path / "canary")
    assert b"mkdir" in old_torch_tar(tmp_path / "canary")


def entry(*shape: int, begin: int = 0, kind: str = "F32") -> dict[str, Any]:
    size = 4
    for side in shape:
        size *= side
    return {"dtype": kind, "shape": list(shape), "data_offsets": [begin, begin + size]}


PAIR = "lora_unet_mid_block_attentions_0_proj_in"
HOSTILE_NAMES = {
    "escape": "\x1b]0;owned\x07\x1b[2J",
    "c1": "\x9b31m",
    "bidi": "\u202emoc.live",
    "zero width": "a\u200bb",
    "up": "../../../etc/passwd",
    "root": "/etc/passwd",
    "empty": "",
    "newlines": "a\r\neri: error: another",
    "markup": "[/x][link=http://a]b",
    "nul": "a\0b",
    "many": "x" * 512,
}


@pytest.mark.parametrize("prefix", ["", f"{PAIR}.", "model.diffusion_model."])
@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_are_shown_escaped(tmp_path: Path, name: str, prefix: str) -> None:
    entries = {(prefix + HOSTILE_NAMES[name])[:512]: entry(2, 2)}
    text = json.dumps(entries).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(ModelError) as refused:
        inspect_path(path)
    lines = [str(refused.value), refused.value.hint or "", *refused.value.problems]
    assert all(line.isprintable() for line in lines), lines
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("command", ["inspect", "export-lora"])
def test_nothing_hidden_reaches_the_terminal(
    tmp_path: Path, server: ForkServer, command: str
) -> None:
    entries = {f"{PAIR}.{name}{n}"[:512]: entry(0) for n, name in enumerate(HOSTILE_NAMES.values())}
    text = json.dumps({"__metadata__": {"\x1b[2J": "\x9b"}, **entries}).encode()
    path = tmp_path / "\x1b[31mred.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    extra = () if command == "inspect" else ("-o", tmp_path / "out.safetensors")
    ended = server.start(command, path, *extra, folder=tmp_path / "said").wait()
    assert ended.code == 4, ended.err
    assert all(character.isprintable() or character == "\n" for character in ended.out + ended.err)
    assert not (tmp_path / "out.safetensors").exists()

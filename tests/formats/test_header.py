"""Headers: what a writer writes is read, everything else is refused for what it is."""

import gzip
import io
import json
import lzma
import pickle
import random
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from eri.errors import EriError, ModelError
from eri.formats import header
from eri.formats.header import TensorInfo, read_header


def write(path: Path, entries: Any, data: bytes = b"", *, text: str | None = None) -> Path:
    """A file with this header, or with this text as its header."""
    encoded = (json.dumps(entries) if text is None else text).encode(errors="surrogatepass")
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


def entry(*shape: int, begin: int = 0, end: int | None = None, dtype: str = "U8") -> dict[str, Any]:
    size = 1
    for side in shape:
        size *= side
    return {
        "dtype": dtype,
        "shape": list(shape),
        "data_offsets": [begin, begin + size if end is None else end],
    }


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"b": torch.zeros(2, 3), "a": torch.zeros((), dtype=torch.float16)}
    save_file(tensors, path, metadata={"who": "é"})
    found = read_header(path)
    assert found.tensors == {
        "b": TensorInfo(dtype="F32", shape=(2, 3), begin=0, end=24),
        "a": TensorInfo(dtype="F16", shape=(), begin=24, end=26),
    }
    assert found.metadata == {"who": "é"}
    assert found.data_start == path.stat().st_size - 26


@pytest.mark.parametrize(
    ("entries", "data"),
    [
        ({}, b""),
        ({"__metadata__": None}, b""),
        ({"a": entry(0, 4)}, b""),
        ({"a": entry(2), "b": entry(0, begin=2), "c": entry(begin=2)}, b"123"),
        ({"a": entry(2) | {"unknown": [{}]}}, b"12"),
    ],
)
def test_reads_what_is_legal(tmp_path: Path, entries: dict[str, Any], data: bytes) -> None:
    path = write(tmp_path / "a", entries, data)
    assert set(read_header(path).tensors) == set(entries) - {"__metadata__"}


def zipped(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, bytes(1000))
    return stream.getvalue()


def tarred(kind: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return stream.getvalue()


SCRIPTED = ("m/data/0", "m/data.pkl", "m/code/__torch__/m.py", "m/constants.pkl", "m/version")
EXPORTED = ("m/data/weights/weight_0", "m/models/model.json", "m/archive_format", "m/version")
OLD_EXPORT = ("serialized_exported_program.json", "serialized_state_dict.json", "version")


def saved() -> bytes:
    stream = io.BytesIO()
    torch.save({"a": torch.ones(1)}, stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"\n <html>", "a web page"),
        (b"\xef\xbb\xbf<?xml", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a git-lfs pointer"),
        (b'{"error": "not found"}', "a JSON text"),
        (gzip.compress(b"x"), "a gzip archive"),
        (gzip.compress(b"x").replace(b"\x1f\x8b", b"BZh"), "a bzip2 archive"),
        (lzma.compress(b"x"), "an xz archive"),
        (zipped("a.txt"), "a zip archive, not"),
        (saved(), "a zip archive of torch.save, not"),
        (zipped("archive/data.pkl", *(f"archive/data/{n}" for n in range(900))), "of torch.save"),
        (zipped(*SCRIPTED), "a program of TorchScript"),
        (zipped(*EXPORTED), "a program of torch.export"),
        (zipped(*OLD_EXPORT), "a program of torch.export"),
        (tarred(tarfile.GNU_FORMAT), "a tar archive"),
        (tarred(tarfile.PAX_FORMAT), "a tar archive"),
        (pickle.dumps({}, protocol=2), "a pickle"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(60), "a 7z archive"),
        (b"GGUF" + bytes(60), "a GGUF file"),
        (bytes(1000), "not a safetensors file"),
        (b"\x08\0\0", "not a safetensors file"),
        (b"just some text that is long enough", "not a safetensors file"),
    ],
)
def test_names_what_a_foreign_file_is(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=found) as refused:
        read_header(path)
    assert str(path) in str(refused.value)
    assert refused.value.hint


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        read_header(tmp_path / "none")
    with pytest.raises(ModelError, match="not a regular file"):
        read_header(tmp_path)


@pytest.mark.parametrize(
    ("entries", "data", "problem"),
    [
        ({"a": entry(2)}, b"1", "take 2 bytes, the file holds 1"),
        ({"a": entry(2)}, b"123", "take 2 bytes, the file holds 3"),
        ({"a": entry(1, begin=1)}, b"12", "begin at 1, expected 0"),
        ({"a": entry(2), "b": entry(2, begin=1)}, b"123", "begin at 1, expected 2"),
        ({"a": entry(2), "b": entry(1, begin=3)}, b"1234", "begin at 3, expected 2"),
        ({"a": entry(2, end=3)}, b"123", "takes 2 bytes, not 3"),
        ({"a": entry(2, begin=2, end=0)}, b"12", "not -2"),
        ({"a": entry(2**40, 2**40, end=2)}, b"12", "bytes, not 2"),
        ({"a": entry(2**70, 0, end=0)}, b"", "no whole number"),
        ({"a": entry(2**62, 2, 0, end=0)}, b"", "is empty, and yet its other sides"),
        ({"a": entry(2**63, end=2**63)}, b"", "no whole number"),
        ({"a": entry(1) | {"shape": [True]}}, b"1", "no whole number"),
        ({"a": entry(1) | {"shape": [1.0]}}, b"1", "no whole number"),
        ({"a": entry(1) | {"shape": [-1]}}, b"1", "no whole number"),
        ({"a": entry(1) | {"data_offsets": [0, 1, 2]}}, b"1", "two data_offsets"),
        ({"a": {"dtype": "U8"}}, b"", "no dtype, shape"),
        ({"a": [1]}, b"", "no dtype, shape"),
        ({"a": entry(1, dtype="U9")}, b"1", "unknown dtype U9"),
        ({"a": entry(*[1] * 9)}, b"1", "9 dimensions"),
        ({"a" * 513: entry(1)}, b"1", "more than 512 bytes"),
        ({"__metadata__": {"a": 1}}, b"", "from text to text"),
        ({"__metadata__": []}, b"", "from text to text"),
    ],
)
def test_damage_is_named(tmp_path: Path, entries: Any, data: bytes, problem: str) -> None:
    path = write(tmp_path / "a", entries, data)
    with pytest.raises(ModelError, match=problem):
        read_header(path)


def test_names_given_twice_are_refused_where_the_library_takes_the_last(tmp_path: Path) -> None:
    one = json.dumps(entry(1))
    path = write(tmp_path / "a", None, b"1", text=f'{{"a":{one},"a":{one}}}')
    with pytest.raises(ModelError, match="'a' stands there twice"):
        read_header(path)
    with safetensors.safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["a"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"__metadata__":{"a":"b","a":"c"}}', "'a' stands there twice"),
        ('{"__metadata__":{},"__metadata__":{}}', "'__metadata__' stands there twice"),
        ('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', "no whole number"),
        ('{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', "half of a character"),
        ('{"a":' + "[" * 100_000, "nests too deep"),
        ('{"a":[' + "[]," * 150_000 + "0]}", r"150,001 of '\[', allowed are 150,000"),
    ],
)
def test_what_json_lets_pass_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        read_header(write(tmp_path / "a", None, text=text))


@pytest.mark.parametrize("length", [2**24 + 1, 2**47, 2**48, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_length_beyond_the_file_allocates_nothing(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(length.to_bytes(8, "little") + b'{"a":1}')
    tracemalloc.start()
    with pytest.raises(ModelError):
        read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_space_before_the_header_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        read_header(write(tmp_path / "a", None, text=" {}"))


def test_names_are_shown_escaped(tmp_path: Path) -> None:
    path = write(tmp_path / "a", {"\x1b[31m\u202e": entry(1, dtype="\x07")}, b"1")
    with pytest.raises(ModelError, match=r"\\x1b\[31m\\u202e") as refused:
        read_header(path)
    assert "\x1b" not in str(refused.value)


def test_a_lone_surrogate_in_a_name_is_no_crash(tmp_path: Path) -> None:
    path = write(tmp_path / "a", None, text='{"\\ud800": 1}')
    with pytest.raises(ModelError, match=r"\\ud800"):
        read_header(path)


def test_header_size_and_count_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a", {"a": entry(0), "b": entry(0)})
    read_header(path)
    monkeypatch.setattr(header, "MAX_TENSORS", 1)
    with pytest.raises(ModelError, match="names 2 tensors, allowed are 1"):
        read_header(path)
    monkeypatch.setattr(header, "MAX_HEADER_BYTES", 10)
    with pytest.raises(ModelError, match="allowed are 10"):
        read_header(path)


MOST = header.MAX_HEADER_BYTES
CRAFTED = {  # beginning, what is written over and over, and end: cheap to write, dear to parse
    "tensors": (b"{", b'"%x":0,', b"}"),
    "texts": (b'{"__metadata__":{', b'"%x":"",', b"}}"),
    "escaped": (b"{", rb'"%x\\":0,', b"}"),
    "sizes": (b'{"a":[', b"1.%x,", b"]}"),
    "lists": (b'{"a":[', b"[],", b"]}"),
    "objects": (b"{", b'"a":{', b""),
}


@pytest.mark.parametrize("kind", CRAFTED)
def test_a_header_that_is_dear_to_parse_is_refused_before(tmp_path: Path, kind: str) -> None:
    begin, part, end = CRAFTED[kind]
    parts = (
        part % number if b"%" in part else part for number in range(MOST // 2 // (len(part) + 4))
    )
    text = begin + b"".join(parts).removesuffix(b",") + end
    assert MOST / 8 < len(text) < MOST
    path = tmp_path / "a"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    tracemalloc.start()
    begun = time.process_time()
    try:
        with pytest.raises(ModelError, match=r"it has [\d,]+ (strings|of '.'), allowed are"):
            read_header(path)
        assert time.process_time() - begun < 0.5
        assert tracemalloc.get_traced_memory()[1] < 4 * len(text)  # parsed: up to 30 times
    finally:
        tracemalloc.stop()


def test_long_texts_and_many_tensors_are_read(tmp_path: Path) -> None:
    """Nothing is counted in strings: what trainers tell of their captions is full of brackets."""
    told = json.dumps({"a, [b]": [{"\\": '"'}]}) * 100_000
    entries: dict[str, object] = {f'{n}, "[{{\\': entry(0) for n in range(10_000)}
    path = write(tmp_path / "a", {"__metadata__": {"ss_tag_frequency": told}, **entries})
    found = read_header(path)
    assert found.tensors.keys() == entries.keys()
    assert found.metadata == {"ss_tag_frequency": told}


@pytest.fixture
def intact(tmp_path: Path) -> Path:
    path = tmp_path / "intact.safetensors"
    save_file({"one": torch.ones(3, 4), "two": torch.ones(5, dtype=torch.float16)}, path)
    return path


def test_every_truncation_is_refused(intact: Path) -> None:
    content = intact.read_bytes()
    for length in range(len(content)):
        intact.write_bytes(content[:length])
        with pytest.raises(ModelError):
            read_header(intact)


def test_mutated_headers_are_read_or_refused(intact: Path) -> None:
    """Nothing but a header or an error of ours comes out; what is read tiles the data."""
    content = intact.read_bytes()
    draw = random.Random(0)
    outcomes = set()
    for _ in range(1000):
        mutated = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            mutated[draw.randrange(min(len(mutated), 160))] = draw.randrange(256)
        intact.write_bytes(mutated)
        try:
            found = read_header(intact)
            assert sum(info.end - info.begin for info in found.tensors.values()) == 58
            outcomes.add("read")
        except EriError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}

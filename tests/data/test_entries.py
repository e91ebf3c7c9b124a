import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from eri.data.entries import key, read_entry, sweep_unfinished, write_entry
from eri.errors import DiskError

TENSORS = {"a": torch.arange(300.0).view(3, 100), "b": torch.ones(7, dtype=torch.bfloat16)}
Damage = Callable[[bytes], bytes]


@pytest.fixture
def entry() -> Path:
    path = key("thing", "made", "from")
    write_entry(path, TENSORS)
    return path


def test_an_entry_is_read_as_it_was_written(entry: Path, isolated_cache: Path) -> None:
    found = read_entry(entry)
    assert found is not None
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert [path for path in isolated_cache.rglob("*") if path.is_file()] == [entry]


def test_the_name_hangs_on_every_value_and_on_nothing_else() -> None:
    names = [
        key("thing", "a", 1),
        key("thing", "a", 2),
        key("thing", "b", 1),
        key("thing", "a", "1"),
        key("thing", "a1"),
        key("thing", "a", [1]),
        key("thing", "a", None),
        key("other", "a", 1),
    ]
    assert len(set(names)) == len(names)
    assert key("thing", "a", 1) == names[0]
    assert key("thing", "a\ud800\x1b[2J/../b").parent.parent == names[0].parent.parent


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_views_of_one_tensor_other_layouts_and_gradients_are_kept_as_values(
    layout: torch.memory_format,
) -> None:
    whole = torch.rand(1, 8, 4, 4, requires_grad=True).to(memory_format=layout)
    first, second = whole.chunk(2, dim=1)
    path = key("thing", "views")
    write_entry(path, {"first": first, "second": second, "first again": first})
    found = read_entry(path)
    assert found is not None
    assert torch.equal(found["first"], first)
    assert torch.equal(found["second"], second)
    assert torch.equal(found["first again"], first)
    assert path.stat().st_size < 3 * 4 * whole.numel()  # not the whole tensor three times


HEADER = 32 + 8  # the digest and the length of the JSON that follows
DAMAGES: dict[str, Damage] = {
    "empty": lambda content: b"",
    "1 byte": lambda content: content[:1],
    "7 bytes": lambda content: content[:7],
    "8 bytes": lambda content: content[:8],
    "digest only": lambda content: content[:32],
    "in the header": lambda content: content[: HEADER + 20],
    "header only": lambda content: content[: _data(content)],
    "in the data": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "one byte long": lambda content: content + b"\0",
    "zero tail": lambda content: content[:-64] + bytes(64),
    "zero data": lambda content: content[: _data(content)].ljust(len(content), b"\0"),
    "all zero": lambda content: bytes(len(content)),
    "bit flip in the digest": lambda content: _flipped(content, 3),
    "bit flip in the header": lambda content: _flipped(content, HEADER + 5),
    "bit flip in the data": lambda content: _flipped(content, len(content) - 3),
    "without a digest": lambda content: content[32:],
}


def _data(content: bytes) -> int:
    """Where the data begin."""
    return HEADER + int.from_bytes(content[32:40], "little")


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_entry_is_none(entry: Path, damage: Damage) -> None:
    content = entry.read_bytes()
    damaged = damage(content)
    assert damaged != content
    entry.write_bytes(damaged)
    assert read_entry(entry) is None


def test_what_is_absent_or_no_entry_is_none(entry: Path) -> None:
    assert read_entry(entry.with_name("absent")) is None
    assert read_entry(entry.parent) is None
    entry.write_bytes(save(TENSORS))
    assert read_entry(entry) is None


def test_a_damaged_entry_is_replaced(entry: Path) -> None:
    entry.write_bytes(b"")
    write_entry(entry, TENSORS)
    assert read_entry(entry) is not None


def test_a_failed_write_leaves_nothing(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(DiskError, match="full"):
        write_entry(entry, {"a": torch.zeros(3)})
    assert os.listdir(entry.parent) == [entry.name]
    assert read_entry(entry) is not None


def test_half_written_files_are_swept_when_they_are_old(entry: Path) -> None:
    old, young = entry.parent / ".writing-0", entry.parent / ".writing-1"
    for path in (old, young):
        path.write_bytes(b"half")
    (entry.parent.parent / "stray").write_bytes(b"")
    days_ago = time.time() - 25 * 60 * 60
    os.utime(old, (days_ago, days_ago))
    os.utime(entry, (days_ago, days_ago))
    sweep_unfinished("thing")
    assert not old.exists()
    assert young.exists()
    assert read_entry(entry) is not None
    sweep_unfinished("never made")

import os
from hashlib import sha256
from pathlib import Path

import pytest

from eri.errors import DiskError
from eri.run import file_hashes
from eri.run.file_hashes import sha256_of

HOUR = 3600 * 10**9


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as large and has lain there for longer than clocks are coarse."""
    monkeypatch.setattr(file_hashes, "LARGE", 4)
    monkeypatch.setattr(file_hashes, "SETTLED", -HOUR)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read through."""
    files: list[Path] = []

    def hashed(path: Path) -> str:
        files.append(path)
        return digest(path)

    monkeypatch.setattr(file_hashes, "sha256", hashed)
    return files


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def test_a_model_is_read_once(model: Path, read: list[Path]) -> None:
    assert sha256_of(model) == sha256_of(model) == digest(model)
    assert read == [model]


def test_other_weights_of_the_same_size_and_time_are_read(model: Path, read: list[Path]) -> None:
    sha256_of(model)
    stat = model.stat()
    model.write_bytes(b"WEIGHTS")
    os.utime(model, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as tools do that keep times
    assert model.stat().st_mtime_ns == stat.st_mtime_ns
    assert sha256_of(model) == digest(model)
    assert read == [model, model]


def test_a_file_in_its_place_is_read(model: Path, read: list[Path], tmp_path: Path) -> None:
    sha256_of(model)
    (tmp_path / "other").write_bytes(b"WEIGHTS")
    (tmp_path / "other").replace(model)
    assert sha256_of(model) == digest(model)
    assert len(read) == 2


@pytest.mark.parametrize(("name", "value"), [("LARGE", 8), ("SETTLED", HOUR)])
def test_small_and_fresh_files_are_read_each_time(
    model: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    monkeypatch.setattr(file_hashes, name, value)
    assert sha256_of(model) == sha256_of(model) == digest(model)
    assert read == [model, model]


@pytest.mark.parametrize("known", ["text", [], ["x"] * 6, [0, 0, 0, 0, 0, None], 7, {}])
def test_what_is_remembered_badly_is_read(model: Path, read: list[Path], known: object) -> None:
    file_hashes.remember("sha256", str(model), known)
    assert sha256_of(model) == digest(model)
    assert read == [model]


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(DiskError):
        sha256_of(tmp_path / "none")

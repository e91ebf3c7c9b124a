"""A file that ends in zeros was not downloaded whole; a model may well hold some zeros."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from eri.errors import ModelError
from eri.formats.header import read_header
from eri.formats.tail import require_written

MATRICES = {f"{n}.weight": torch.ones(4, 4) for n in range(6)}


def check(path: Path, tensors: dict[str, Tensor], *, zeros: int = 0) -> None:
    """Look at a file of these tensors whose last bytes are zeros."""
    save_file(tensors, path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - zeros] + bytes(zeros))
    require_written(path, read_header(path))


def test_zeros_from_the_fourth_last_matrix_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="last 256 bytes of this file are all zero") as refused:
        check(tmp_path / "a", MATRICES, zeros=4 * 64)
    assert refused.value.hint == "download it again"
    check(tmp_path / "a", MATRICES, zeros=4 * 64 - 4)
    check(tmp_path / "a", MATRICES)


def test_layers_of_zeros_are_no_damage(tmp_path: Path) -> None:
    zeros = {"5.weight": torch.zeros(4, 4), "4.weight": torch.zeros(4, 4), "z": torch.zeros(99)}
    check(tmp_path / "a", MATRICES | zeros)
    check(tmp_path / "a", {"a": torch.zeros(4, 4), "b": torch.zeros(4, 4), "c": torch.zeros(9)})
    check(tmp_path / "a", {})


def test_of_large_matrices_a_mebibyte_is_enough(tmp_path: Path) -> None:
    large = {f"{n}.weight": torch.ones(512, 512) for n in range(4)}
    with pytest.raises(ModelError, match="last 1,048,576 bytes"):
        check(tmp_path / "a", large, zeros=2**20)
    check(tmp_path / "a", large, zeros=2**20 - 4)

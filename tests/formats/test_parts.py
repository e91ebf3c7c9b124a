"""What a piece says of its tensor is what is read from the file."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eri.formats.parts import Piece
from eri.formats.tensors import stream


def test_a_piece_is_a_place_and_not_a_tensor(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    stored = torch.arange(12.0).reshape(6, 2)
    save_file({"stored": stored}, file)
    whole = Piece(file=file, key="stored", dtype="F32", shape=(6, 2))
    pieces = {
        "whole": whole,
        "rows": dataclasses.replace(whole, shape=(2, 2), rows=(2, 4)),
        "turned": dataclasses.replace(whole, shape=(2, 6), transposed=True),
    }
    found = dict(stream(pieces, device="cpu", dtype=torch.float32))
    assert {name: tuple(t.shape) for name, t in found.items()} == {
        name: piece.shape for name, piece in pieces.items()
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        whole.key = "other"  # type: ignore[misc]

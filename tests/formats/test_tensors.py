"""Tensors in and out: exact, readable by the library, the same bytes every time."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from eri.errors import ModelError, NonFiniteError
from eri.formats.header import read_header
from eri.formats.tensors import DTYPE_NAMES, cast, data_sha256, load_tensors, save_tensors


def several() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "z": torch.randn(3, 4),
        "half": torch.randn(2, 3).half(),
        "a": torch.randn(4, 2, 3, 3),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 5),
        "flag": torch.tensor([True, False]),
        "name with ü": torch.randn(2).bfloat16(),
    }


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("load", [load_tensors, load_file])
def test_round_trip(tmp_path: Path, load: Callable[[Path], dict[str, Tensor]]) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(several(), path, {"b": "2", "a": '"1"'})
    assert equal(load(path), several())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"a": '"1"', "b": "2"}


def test_bytes_do_not_depend_on_order_layout_or_the_moment(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    save_tensors(several(), one, {"a": "1", "b": "2"})
    shuffled = dict(reversed(several().items()))
    shuffled["a"] = shuffled["a"].to(memory_format=torch.channels_last)
    shuffled["z"] = shuffled["z"].t().contiguous().t()
    save_tensors(shuffled, other, {"b": "2", "a": "1"})
    assert one.read_bytes() == other.read_bytes()


def test_data_is_that_of_the_library(tmp_path: Path) -> None:
    """Same order of tensors and same padding, so that hashes over the data agree."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    save_tensors(several(), ours)
    save_file(several(), theirs)
    assert ours.read_bytes() == theirs.read_bytes()


def test_header_begins_as_a_web_ui_wants_it(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_tensors(several(), path, {"a": "1"})
    assert path.read_bytes()[8:10] == b'{"'
    assert read_header(path).data_start % 8 == 0


def test_data_sha256_is_over_the_bytes_behind_the_header(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_tensors(several(), path, {"a": "1"})
    data = path.read_bytes()[read_header(path).data_start :]
    assert data_sha256(several()) == hashlib.sha256(data).hexdigest()


def test_every_dtype_that_is_written_is_read(tmp_path: Path) -> None:
    tensors = {name: torch.ones(3).to(dtype) for dtype, name in DTYPE_NAMES.items()}
    save_tensors(tensors, tmp_path / "a")
    loaded = load_tensors(tmp_path / "a")
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {
        name: dtype for dtype, name in DTYPE_NAMES.items()
    }


def test_loading_casts_floats_only(tmp_path: Path) -> None:
    save_tensors(several(), tmp_path / "a")
    loaded = load_tensors(tmp_path / "a", dtype=torch.float64)
    assert loaded["half"].dtype == loaded["z"].dtype == torch.float64
    assert loaded["count"].dtype == torch.int64
    assert loaded["flag"].dtype == torch.bool


def test_an_unusable_dtype_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a"
    text = b'{"a":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}'
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"1")
    with pytest.raises(ModelError, match="F8_E8M0"):
        load_tensors(path)


@pytest.mark.parametrize(
    "tensors",
    [{"__metadata__": torch.ones(1)}, {"a": torch.ones(1, dtype=torch.complex128)}],
    ids=["name", "dtype"],
)
def test_what_the_format_has_no_place_for(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        save_tensors(tensors, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_cast_keeps_what_fits() -> None:
    found = cast({"a": torch.tensor([1.0, -65504.0, 1e-9])}, torch.float16)
    assert found["a"].tolist() == [1.0, -65504.0, 0.0]


@pytest.mark.parametrize(
    ("value", "dtype", "problem"),
    [
        (float("nan"), torch.float32, "1 of 2 numbers are NaN or infinite"),
        (float("inf"), torch.bfloat16, "1 of 2 numbers are NaN or infinite"),
        (70000.0, torch.float16, "7e+04 is too large for float16"),
    ],
)
def test_cast_refuses_what_is_not_finite(value: float, dtype: torch.dtype, problem: str) -> None:
    tensors = {f"t{i}": torch.tensor([1.0, value]) for i in range(7)} | {"ok": torch.ones(1)}
    with pytest.raises(NonFiniteError, match="7 of 8 tensors") as refused:
        cast(tensors, dtype)
    assert len(refused.value.problems) == 6
    assert refused.value.problems[-1] == "and 2 more"
    assert refused.value.problems[0] == f"t0: {problem}"

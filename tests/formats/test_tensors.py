"""Tensors in and out: exact, readable by the library, the same bytes every time."""

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from eri.errors import ModelError, NonFiniteError
from eri.formats.header import read_header
from eri.formats.parts import Piece
from eri.formats.tensors import DTYPE_NAMES, cast, data_sha256, load_tensors, save_tensors, stream


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


def pieces(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    """A file of these tensors, and where each lies in it."""
    save_tensors(tensors, path)
    return {
        name: Piece(file=path, key=name, dtype=info.dtype, shape=info.shape)
        for name, info in read_header(path).tensors.items()
    }


def streamed(found: Mapping[str, Piece], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return dict(stream(found, device="cpu", dtype=dtype))


def test_a_stream_gives_every_tensor_of_every_file_once(tmp_path: Path) -> None:
    one, other = several() | {"z": torch.ones(2)}, {"b": torch.randn(5)}
    floats = {name: tensor for name, tensor in one.items() if tensor.is_floating_point()}
    found = [*stream(
        pieces(tmp_path / "one", floats) | pieces(tmp_path / "other", other),
        device="cpu",
        dtype=torch.float64,
    )]  # fmt: skip
    assert [name for name, _ in found if name in floats] != []
    assert len(found) == len(floats) + 1
    assert equal(dict(found), {n: t.double() for n, t in (floats | other).items()})


@pytest.mark.parametrize(
    "stored", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64]
)
def test_a_stream_casts(tmp_path: Path, stored: torch.dtype) -> None:
    tensor = torch.tensor([[1.0, -0.5], [448.0, 0.0625]]).to(stored)
    found = streamed(pieces(tmp_path / "a", {"a": tensor}))
    assert equal(found, {"a": tensor.float()})
    assert found["a"][1, 0] == 448


def test_a_stream_reads_rows_and_turns_matrices(tmp_path: Path) -> None:
    stored = torch.arange(24.0).reshape(6, 4)
    whole = pieces(tmp_path / "a", {"a": stored})["a"]
    found = streamed(
        {
            "rows": replace(whole, shape=(2, 4), rows=(2, 4)),
            "turned": replace(whole, shape=(4, 6), transposed=True),
            "both": replace(whole, shape=(4, 2), rows=(4, 6), transposed=True),
        }
    )
    assert equal(found, {"rows": stored[2:4], "turned": stored.T, "both": stored[4:].T})
    assert all(tensor.is_contiguous() for tensor in found.values())


def test_what_a_stream_gives_is_not_tied_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    found = streamed(pieces(path, {"a": torch.ones(1000)}))
    tied = load_tensors(path)
    with path.open("r+b") as file:
        file.seek(-4000, 2)
        file.write(bytes(4000))
    assert found["a"].sum() == 1000
    if sys.platform == "linux":
        assert tied["a"].sum() < 1000  # a tensor that is tied to the file has changed with it


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_stream_names_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    tensors = {f"bad\x1b{n}": torch.tensor([1.0, value, 2.0]) for n in range(7)}
    found = pieces(tmp_path / "a", tensors | {"fine": torch.tensor([1e38, -1e38])})
    with pytest.raises(ModelError, match="7 weights hold a NaN or an infinity") as refused:
        streamed(found)
    assert set(refused.value.problems) < {rf"bad\x1b{n}" for n in range(7)} | {"and 2 more"}
    assert refused.value.where == str(tmp_path / "a") and refused.value.hint
    assert len(streamed({"fine": found["fine"]})) == 1


def test_a_stream_refuses_what_the_wanted_type_cannot_hold(tmp_path: Path) -> None:
    found = pieces(tmp_path / "a", {"large": torch.tensor([70000.0]), "fine": torch.ones(2)})
    with pytest.raises(ModelError, match="1 weights hold") as refused:
        streamed(found, torch.float16)
    assert refused.value.problems == ("large",)
    assert streamed(found, torch.bfloat16)["large"] == 70144


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_a_stream_refuses_weights_that_are_no_plain_numbers(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    found = pieces(tmp_path / "a", {"whole": torch.ones(2).to(dtype), "fine": torch.ones(2)})
    with pytest.raises(ModelError, match="1 weights are not plain floating-point") as refused:
        streamed(found)
    assert refused.value.problems == (f"whole: {DTYPE_NAMES[dtype]}",)
    assert len(streamed({"fine": found["fine"]})) == 1


def test_a_stream_of_a_damaged_file_is_refused(tmp_path: Path) -> None:
    found = pieces(tmp_path / "a", {"a": torch.ones(9)})
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-1])
    with pytest.raises(ModelError, match="cannot be read"):
        streamed(found)


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

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eri.errors import ModelError
from eri.models import load_unet

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(sd15: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sd15, tmp_path / "model")


def rewrite(folder: Path, change) -> None:
    path = folder / "unet" / WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_model_its_unet_folder_and_half_precision_files_are_read(copy: Path) -> None:
    whole = load_unet(copy)
    part = load_unet(copy / "unet")
    assert torch.equal(whole.conv_in.weight, part.conv_in.weight)
    assert not whole.training
    assert not any(p.requires_grad for p in whole.parameters())
    (copy / "unet" / WEIGHTS).rename(copy / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert torch.equal(load_unet(copy).conv_in.weight, whole.conv_in.weight)


def test_weights_come_in_the_type_that_was_asked_for(copy: Path) -> None:
    rewrite(copy, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items()}))
    assert load_unet(copy).conv_in.weight.dtype == torch.float32
    assert load_unet(copy, dtype=torch.bfloat16).conv_in.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("conv_in.weight"), r"1 tensors do not fit"),
        (lambda tensors: tensors.update({"conv_in.extra": torch.zeros(1)}), "belong to no"),
        (
            lambda tensors: tensors.update({"conv_in.weight": torch.zeros(32, 9, 3, 3)}),
            r"1 tensors do not fit",
        ),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_weights_that_do_not_fit_are_refused_by_name(copy: Path, change, message: str) -> None:
    rewrite(copy, change)
    with pytest.raises(ModelError, match=message) as refused:
        load_unet(copy)
    assert "conv_in" in " ".join([str(refused.value), *refused.value.problems])


def test_a_long_list_is_cut(copy: Path) -> None:
    def drop(tensors: dict) -> None:
        for name in [n for n in tensors if n.startswith("mid_block.")]:
            del tensors[name]

    rewrite(copy, drop)
    with pytest.raises(ModelError) as refused:
        load_unet(copy)
    assert len(refused.value.problems) == 6
    assert refused.value.problems[-1].startswith("and ")


def test_a_cut_file_is_refused(copy: Path) -> None:
    path = copy / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError):
        load_unet(copy)

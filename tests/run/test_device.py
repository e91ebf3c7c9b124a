from pathlib import Path

import pytest
import torch

from eri.errors import ConfigError
from eri.run import device
from eri.run.device import choose_dtype, set_arithmetic, unusable_card

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("precision", "place", "bf16", "dtype"),
    [
        ("auto", CPU, False, torch.float32),
        ("auto", CUDA, True, torch.bfloat16),
        ("auto", CUDA, False, torch.float16),
        ("fp32", CUDA, True, torch.float32),
        ("bf16", CPU, False, torch.bfloat16),
        ("fp16", CUDA, True, torch.float16),
    ],
)
def test_types(
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    place: torch.device,
    bf16: bool,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert choose_dtype(precision, place) == dtype


def test_fp16_on_the_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        choose_dtype("fp16", CPU)


@pytest.fixture
def with_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An NVIDIA card in the machine that this PyTorch does not see."""
    monkeypatch.setattr(device, "_has_nvidia_card", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("with_card")
def test_a_card_without_a_pytorch_for_it_is_told_with_the_mend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    found = unusable_card()
    assert found is not None
    assert "no CUDA in it" in found[0]
    assert found[1] == "pip install --force-reinstall torch==2.13.0"


@pytest.mark.usefixtures("with_card")
def test_a_card_without_a_driver_for_this_pytorch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = unusable_card()
    assert found is not None
    assert "driver" in found[0]


@pytest.mark.usefixtures("with_card")
def test_a_hidden_card_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = unusable_card()
    assert found is not None
    assert found[1] == "unset CUDA_VISIBLE_DEVICES"


def test_nothing_is_told_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_has_nvidia_card", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert unusable_card() is None


@pytest.mark.parametrize("deterministic", [True, False])
def test_arithmetic_is_settled_and_memory_is_not_filled(deterministic: bool) -> None:
    try:
        set_arithmetic(deterministic=deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.empty(1 << 16).isnan().all()
    finally:
        set_arithmetic(deterministic=False)

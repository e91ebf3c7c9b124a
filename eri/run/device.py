"""Where a run computes and in which type, and why a card that is there may not be usable."""

import os
import shutil
from pathlib import Path

import torch

from eri.errors import ConfigError

__all__ = ["choose_device", "choose_dtype", "set_arithmetic", "unusable_card"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device() -> torch.device:
    """The GPU if this PyTorch can use one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of the frozen weights and of the net's arithmetic.

    Args:
        precision: `fp32`, `bf16`, `fp16`, or `auto`: fp32 on the CPU, bf16 where the card has it,
            else fp16.
        device: where the net runs.

    Raises:
        ConfigError: a type that the device cannot train in.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if has_bf16 else torch.float16
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError(
            "fp16 needs a GPU; on the CPU use auto, fp32 or bf16", where="train.precision"
        )
    return DTYPES[precision]


def set_arithmetic(*, deterministic: bool) -> None:
    """Settle how this process computes, before it does: float32 in full, repeatable or fast.

    PyTorch's deterministic mode also fills all memory that it allocates, in a kernel each, so that
    what reads it unwritten repeats as well. Nothing here does, as the tests of the kernels show.

    Args:
        deterministic: take no kernel whose result may differ from one time to the next.
    """
    torch.backends.cudnn.allow_tf32 = False  # in the VAE's convolutions too
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it said
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def unusable_card() -> tuple[str, str] | None:
    """What keeps this PyTorch from an NVIDIA card that the machine has, and the mend.

    Returns:
        The problem and a command or a step that mends it; None where nothing is wrong.
    """
    if torch.cuda.is_available() or not _has_nvidia_card():
        return None
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return (
            "an NVIDIA card is there, but CUDA_VISIBLE_DEVICES hides it",
            "unset CUDA_VISIBLE_DEVICES",
        )
    if torch.version.cuda is None:
        version = torch.__version__.partition("+")[0]
        return (
            f"an NVIDIA card is there, but this PyTorch ({torch.__version__}) has no CUDA in it",
            f"pip install --force-reinstall torch=={version}",
        )
    return (
        f"an NVIDIA card is there, but this PyTorch (CUDA {torch.version.cuda}) cannot use it; "
        "its driver is missing or too old",
        f"install an NVIDIA driver for CUDA {torch.version.cuda} or newer, then run nvidia-smi",
    )


def _has_nvidia_card() -> bool:
    cards = Path("/proc/driver/nvidia/gpus")
    if cards.is_dir():
        return any(cards.iterdir())
    return shutil.which("nvidia-smi") is not None

"""Whether a run has CUDA kernels of its own: said in the plan, settled before it begins."""

from collections.abc import Callable
from pathlib import Path

import torch

from eri.errors import ConfigError
from eri.layers.backend import (
    Backend,
    capability_of,
    kernels_ready,
    set_backend,
    unsupported_device,
)
from eri.layers.build import ready_library
from eri.layers.prebuilt import is_prebuilt
from eri.layers.toolchain import architecture, find_toolchain

__all__ = ["check_backend", "start_backend"]

WHERE = "train.backend"
HINT = "auto and reference take PyTorch's own operations"


def check_backend(backend: Backend, device: torch.device) -> str:
    """Look, without building anything, at what a run's fused operations will be.

    Args:
        backend: the setting.
        device: where the run computes.

    Returns:
        A line for the plan.

    Raises:
        ConfigError: the setting is `cuda`, and this machine cannot follow it.
        DiskError: the cache cannot be used.
    """
    if backend == "reference":
        return "kernels  PyTorch's own"
    never = unsupported_device(device)
    found = [never] if never is not None else _found(capability_of(device))
    if isinstance(found, str):
        return f"kernels  our own for sm_{architecture(capability_of(device))}{found}"
    if backend == "cuda":
        raise ConfigError(
            "there are no CUDA kernels for this run", where=WHERE, hint=HINT, problems=found
        )
    return f"kernels  PyTorch's own: {'; '.join(found)}"


def start_backend(backend: Backend, device: torch.device, say: Callable[[str], None]) -> None:
    """Choose the backend for this process, and build and load the kernels that it needs.

    Args:
        backend: the setting.
        device: where the run computes.
        say: gets a line when kernels are built, and each reason once why one is not used.

    Raises:
        ConfigError: the kernels could not be built, or the setting is `cuda` and there are none.
        DiskError: the cache cannot be written.
    """
    set_backend(backend, say)
    kernels_ready(device)


def _found(capability: tuple[int, int]) -> str | list[str]:
    """Where the kernels for a card come from, in words; or all that keeps a run from having any."""
    ready = ready_library(capability)
    if isinstance(ready, Path):
        return ", from the wheel" if is_prebuilt(ready) else ""
    toolchain = find_toolchain(capability)
    if isinstance(toolchain, list):
        return [*filter(None, [ready]), *map(str, toolchain)]
    return ", to be built first"

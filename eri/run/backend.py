"""Whether a run has CUDA kernels of its own: said in the plan, settled before it begins."""

from collections.abc import Callable

import torch

from eri.errors import ConfigError
from eri.layers.backend import (
    Backend,
    capability_of,
    kernels_ready,
    set_backend,
    unsupported_device,
)
from eri.layers.build import built_library
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
    lacks = _lacks(device)
    if lacks and backend == "cuda":
        raise ConfigError(
            "there are no CUDA kernels for this run", where=WHERE, hint=HINT, problems=lacks
        )
    if lacks:
        return f"kernels  PyTorch's own: {'; '.join(lacks)}"
    capability = capability_of(device)
    later = "" if built_library(capability) else ", to be built first"
    return f"kernels  our own for sm_{architecture(capability)}{later}"


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


def _lacks(device: torch.device) -> list[str]:
    """All that keeps our kernels from a device, in words; nothing where they are built."""
    never = unsupported_device(device)
    if never is not None:
        return [never]
    capability = capability_of(device)
    if built_library(capability):
        return []
    toolchain = find_toolchain(capability)
    return [str(lack) for lack in toolchain] if isinstance(toolchain, list) else []

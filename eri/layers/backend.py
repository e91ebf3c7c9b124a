"""Which implementation a fused op takes: its CUDA kernel or its reference in PyTorch.

`auto` takes the kernel wherever there is one and says once, for each reason, why it does not;
`cuda` takes the kernel or raises; `reference` never takes it. A kernel that should have been built
and could not be is an error under `auto`, too: nothing becomes slow in silence.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from eri.errors import ConfigError
from eri.layers.build import load_kernels

__all__ = [
    "Backend",
    "capability_of",
    "current_backend",
    "is_transformed",
    "kernels_ready",
    "no_kernels",
    "set_backend",
    "unsupported_device",
    "use_kernel",
]

Backend = Literal["auto", "cuda", "reference"]
OLDEST = (8, 0)  # capability of the oldest cards with kernels

log = logging.getLogger(__name__)


@dataclass
class _State:
    """The choice of this process; set once, by who starts the work."""

    backend: Backend = "auto"
    say: Callable[[str], None] = log.warning
    said: set[str] = field(default_factory=set)
    ready: set[torch.device] = field(default_factory=set)  # asked for at every call of an op


_state = _State()


def set_backend(backend: Backend, say: Callable[[str], None] = log.warning) -> None:
    """Choose for all ops of this process.

    Args:
        backend: `auto`, `cuda` or `reference`.
        say: gets a line when kernels are built, and each reason once why one is not used.

    Raises:
        ValueError: another name.
    """
    if backend not in {"auto", "cuda", "reference"}:
        raise ValueError(f"backend {backend!r}: expected auto, cuda or reference")
    _state.backend, _state.say = backend, say
    _state.said.clear()
    _state.ready.clear()


def current_backend() -> Backend:
    """The backend chosen last; `auto` at first."""
    return _state.backend


def is_transformed() -> bool:
    """Whether `torch.compile` or `torch.func` turns what runs now into another program.

    These know how to fuse, batch and differentiate PyTorch's own operations.
    """
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def use_kernel(op: str, device: torch.device, unsupported: Callable[[], str | None]) -> bool:
    """Whether an op takes its kernel; builds and loads the kernels when the first one needs them.

    Args:
        op: its name, for messages.
        device: of its tensors.
        unsupported: the reason why the kernel cannot take these arguments, or None.

    Raises:
        ConfigError: the backend is `cuda` and there is a reason, or the build failed.
    """
    return kernels_ready(device) and _granted(unsupported(), f"{op}: ")


def kernels_ready(device: torch.device) -> bool:
    """Whether ops on a device take kernels at all; builds and loads these if need be.

    Raises:
        ConfigError: the backend is `cuda` and there are none, or the build failed.
    """
    if device.type == "meta" or _state.backend == "reference":
        return False
    if device.type != "cuda" and _state.backend == "auto":
        return False
    if device not in _state.ready and _granted(no_kernels(device), ""):
        _state.ready.add(device)
    return device in _state.ready


def _granted(reason: str | None, where: str) -> bool:
    """Whether there is no reason against a kernel; what a reason leads to."""
    if reason is None:
        return True
    if _state.backend == "cuda":
        raise ConfigError(
            f"{where}{reason}",
            where="train.backend",
            hint="auto takes PyTorch's own operations where there is no kernel",
        )
    line = f"{where}PyTorch's own operations, not our kernels: {reason}"
    if line not in _state.said:
        _state.said.add(line)
        _state.say(line)
    return False


def no_kernels(device: torch.device) -> str | None:
    """Why there are no kernels for a device, in words; None once they are loaded.

    Raises:
        ConfigError: they could not be built or loaded.
    """
    return unsupported_device(device) or load_kernels(capability_of(device), _state.say)


def unsupported_device(device: torch.device) -> str | None:
    """Why no kernel can ever run on a device, in words; None where they can."""
    if device.type != "cuda":
        return f"our kernels are for NVIDIA cards, this is {device.type}"
    if sys.platform != "linux":
        return f"our kernels are built on Linux and WSL2, this is {sys.platform}"
    if torch.version.hip is not None:
        return "our kernels are for NVIDIA cards, this PyTorch is for AMD's"
    if (found := capability_of(device)) < OLDEST:
        return "our kernels are for cards from sm_{}{}, this is sm_{}{}".format(*OLDEST, *found)
    return None


def capability_of(device: torch.device) -> tuple[int, int]:
    """(9, 0) for a Hopper card."""
    return torch.cuda.get_device_capability(device)

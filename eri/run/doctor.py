"""What this machine offers a run, what is missing, and the command that mends it."""

import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

import torch

import eri
from eri.errors import EriError
from eri.files import cache_dir
from eri.layers.backend import capability_of, unsupported_device
from eri.layers.build import library_folder, load_kernels, ready_library
from eri.layers.prebuilt import is_prebuilt
from eri.layers.toolchain import Toolchain, architecture, cuda_version, find_toolchain, version_of
from eri.run.base import look_at
from eri.run.device import choose_device, choose_dtype, unusable_card

__all__ = ["doctor"]

LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "pillow", "pydantic", "numpy")


def doctor() -> tuple[list[str], list[str]]:
    """Look at the machine.

    Returns:
        Lines that describe it, and problems, each with its mend.
    """
    device = choose_device()
    facts = [
        f"eri {eri.__version__}, Python {platform.python_version()}, {platform.platform()}",
        ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
        f"CPU: {os.cpu_count()} cores, PyTorch uses {torch.get_num_threads()} threads",
        _card(device),
    ]
    problems = []
    unusable = unusable_card()
    if unusable is not None:
        what, mend = unusable
        problems.append(f"{what}\n  mend: {mend}")
    try:
        cache = cache_dir()
        free = shutil.disk_usage(cache).free / 2**30
        facts.append(f"cache: {cache}, {free:.0f} GiB free")
    except EriError as error:
        problems.append(f"cache: {error}\n  mend: {error.hint}")
    try:
        more_facts, more_problems = _kernels(device)
        facts += more_facts
        problems += more_problems
    except EriError as error:
        problems.append(f"kernels: {error}\n  mend: {error.hint}")
    try:
        demo = look_at("demo")
        count = sum(demo.parts.parameters.values())
        facts.append(
            f"demo model: {count / 1e6:.1f} M parameters, {demo.resolution}x{demo.resolution}"
        )
    except EriError as error:
        problems.append(f"demo model: {error}\n  mend: install eri again")
    return facts, problems


def _card(device: torch.device) -> str:
    if device.type == "cpu":
        return "GPU: none that this PyTorch can use; training runs on the CPU in fp32"
    properties = torch.cuda.get_device_properties(device)
    dtype = str(choose_dtype("auto", device)).removeprefix("torch.")
    return (
        f"GPU: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
        f"sm_{properties.major}{properties.minor}, CUDA {torch.version.cuda}; trains in {dtype}"
    )


def _kernels(device: torch.device) -> tuple[list[str], list[str]]:
    """Where the CUDA kernels are, or what they will be built with, or what is missing for that.

    Raises:
        EriError: the folder, or the library in it, cannot be used.
    """
    never = unsupported_device(device)
    if never is not None:
        return [f"kernels: PyTorch's own; {never}"], []
    capability = capability_of(device)
    name, ready = f"sm_{architecture(capability)}", ready_library(capability)
    found = find_toolchain(capability)
    facts = [_compilers(found)] if isinstance(found, Toolchain) else []
    if isinstance(ready, Path):
        refused = load_kernels(capability)
        if refused is not None:
            return [*facts, f"kernels: PyTorch's own; {refused}"], []
        ready = ready_library(capability)  # another one, if the system refused the wheel's
    if isinstance(ready, Path):
        origin = "brought by the wheel" if is_prebuilt(ready) else "built here"
        return [*facts, f"kernels: our own for {name}, {origin}, in {ready.parent}"], []
    if ready is not None:
        facts.append(f"kernels: {ready}")
    if isinstance(found, Toolchain):
        later = f"built by the first run into {library_folder(capability)}"
        return [*facts, f"kernels: our own for {name}, {later}"], []
    lacks = [f"kernels: {lack.what}\n  mend: {lack.mend}" for lack in found]
    return [*facts, f"kernels: PyTorch's own; ours for {name} cannot be built here"], lacks


def _compilers(found: Toolchain) -> str:
    return (
        f"compilers: nvcc of CUDA {cuda_version(found.nvcc)} ({found.nvcc}), "
        f"{found.cxx} {version_of(found.cxx)}, ninja {version_of(found.ninja)}"
    )

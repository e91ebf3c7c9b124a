"""On what is measured: the card, the software, and what it chooses by itself."""

import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend

from scripts.benchmark.problem import TEXT_TOKENS

PACKAGES = ("torch", "diffusers", "peft", "transformers", "accelerate")


def facts(device: torch.device) -> dict[str, str]:
    """What a reader has to know beside the numbers."""
    found = {"card": "none", "CPU": _cpu(), "Python": platform.python_version()}
    found |= {name: found_version for name in PACKAGES if (found_version := _version(name))}
    if device.type != "cuda":
        return found
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    found["card"] = f"{torch.cuda.get_device_name(device)}, {total:.0f} GiB"
    found["driver"] = _driver()
    found["CUDA"] = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    found["attention"] = f"self {_sdpa(device, 4096)}, cross {_sdpa(device, TEXT_TOKENS)}"
    found["bf16 product"] = f"{matmul_rate(device):.0f} TFLOP/s of 8192 x 8192 x 8192"
    return found


def matmul_rate(device: torch.device, size: int = 8192, times: int = 20) -> float:
    """TFLOP/s of a bfloat16 matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        a @ b
    synchronize(device)
    return 2e-12 * size**3 * times / (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sdpa(device: torch.device, keys: int) -> str:
    """The attention kernel that PyTorch takes for bfloat16 heads of 64."""
    kind = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
    q = torch.randn(1, 10, 4096, 64, **kind)
    k, v = (torch.randn(1, 10, keys, 64, **kind) for _ in range(2))
    try:
        return SDPBackend(torch._fused_sdp_choice(q, k, v)).name.removesuffix("_ATTENTION").lower()
    except (AttributeError, RuntimeError, ValueError) as error:
        return f"unknown ({error})"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

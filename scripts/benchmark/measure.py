"""What one step consists of: its kernels and their time, and the bytes that its operations move."""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.benchmark.traffic import bytes_of

TOP = 25  # kernels that a breakdown lists
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}  # categories of a trace
# The first that fits a kernel's name; case does not matter.
CLASSES = {
    "optimizer": r"adamw|multi_tensor_apply|fusedoptimizer|lpnorm",
    "attention": r"sdpa|flash|fmha|attention|mha_",
    "norm": r"group_?norm|layer_?norm|rowwisemoments|fusedparams|internalgradients|gammabeta",
    "copy/cat": r"memcpy|memset|nchwtonhwc|nhwctonchw|catarray|triton_\w*_cat_|copy|transpose|fill",
    "conv": r"conv|fprop|dgrad|wgrad|implicit_gemm",
    "gemm": r"gemm|nvjet|splitk|cutlass|cublas|addmm|\bmm\b|bmm",
    "reduce": r"reduce|triton_(red|per)|softmax",
    "elementwise": r"elementwise|vectorized|unrolled|triton_poi|gelu|silu|::(add|mul|sub)",
}


@dataclass(frozen=True)
class Kernel:
    """Something that the device did."""

    name: str
    microseconds: float
    category: str  # of the trace


def kernels_of(step: Callable[[], None], device: torch.device) -> list[Kernel]:
    """Everything that the device does in one step; on the CPU the operations, nested ones too."""
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with profile(activities=[activity]) as profiler:
            step()
            if on_gpu:
                torch.cuda.synchronize()
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return kernels_in(events, ON_DEVICE if on_gpu else {"cpu_op"})


def kernels_in(events: Iterable[Mapping[str, Any]], categories: set[str]) -> list[Kernel]:
    """The events of some categories of a trace."""
    return [
        Kernel(event["name"], float(event["dur"]), event["cat"])
        for event in events
        if event.get("cat") in categories and "dur" in event
    ]


def launches(kernels: Sequence[Kernel]) -> int:
    """How many kernels; copies and fills by the driver are none."""
    return sum(not kernel.category.startswith("gpu_mem") for kernel in kernels)


def kernel_class(name: str) -> str:
    """What a kernel does, by its name."""
    for kind, pattern in CLASSES.items():
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other"


def breakdown(kernels: Sequence[Kernel], milliseconds: float) -> str:
    """A table of the time of a step by what its kernels do, and the kernels that take most.

    Args:
        kernels: of one step.
        milliseconds: that a step takes when nobody looks.
    """
    total = sum(kernel.microseconds for kernel in kernels) or 1.0
    lines = [
        f"kernels take {total / 1e3:.2f} ms of a step of {milliseconds:.2f} ms",
        f"{'class':<14}{'ms':>9}{'share':>8}{'kernels':>9}",
    ]
    for kind, (time, count) in _by(kernels, lambda kernel: kernel_class(kernel.name)):
        lines.append(f"{kind:<14}{time / 1e3:>9.3f}{time / total:>8.1%}{count:>9}")
    lines.append(f"{'class':<12}{'ms':>9}{'share':>8}{'times':>7}{'us each':>9}  kernel")
    for name, (time, count) in _by(kernels, lambda kernel: kernel.name)[:TOP]:
        kind, each = kernel_class(name), time / count
        start = f"{kind:<12}{time / 1e3:>9.3f}{time / total:>8.1%}{count:>7}{each:>9.1f}"
        lines.append(f"{start}  {short(name)}")
    return "\n".join(lines)


def short(name: str, width: int = 72) -> str:
    """A kernel's name in one line, its middle left out where it is long."""
    name = re.sub(r"\(anonymous namespace\)::|at::native::|void |std::|c10::", "", name)
    return name if len(name) <= width else f"{name[: width - 25]}…{name[-24:]}"


def _by(
    kernels: Sequence[Kernel], key: Callable[[Kernel], str]
) -> list[tuple[str, tuple[float, int]]]:
    """Time and number of kernels by something, most time first."""
    found: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        found[key(kernel)].append(kernel.microseconds)
    sums = {name: (sum(times), len(times)) for name, times in found.items()}
    return sorted(sums.items(), key=lambda item: -item[1][0])


def operations(step: Callable[[], None], device: torch.device, rows: int = 30) -> str:
    """PyTorch's own table of the operations of a step, by the shapes of their inputs."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    averages = profiler.key_averages(group_by_input_shape=True)
    return averages.table(
        sort_by=order, row_limit=rows, max_name_column_width=40, max_shapes_column_width=60
    )


class _Bytes(TorchDispatchMode):
    """Sums what every operation moves, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.bytes[func._schema.name] += bytes_of(func, args, kwargs, result)
        return result


def bytes_moved(step: Callable[[], None]) -> dict[str, int]:
    """The bytes that a step's operations must read and write, by their names; see `traffic`."""
    with _Bytes() as counted:
        step()
    return counted.bytes


def traffic(moved: Mapping[str, int]) -> str:
    """A table of the operations that move most."""
    most = sorted(moved.items(), key=lambda pair: -pair[1])[:TOP]
    lines = [f"{'GB':>9}  operation"]
    return "\n".join([*lines, *(f"{bytes / 1e9:>9.3f}  {name}" for name, bytes in most)])

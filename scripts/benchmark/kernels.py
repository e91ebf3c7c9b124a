"""eri's own kernels: how much of the card's bandwidth they reach.

The bandwidth is that of a copy of 1 GiB, read and written. A kernel's bytes are those of its
operands, each as often as the algorithm needs it. Beside it stands what PyTorch takes for the same.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import nn

from eri.layers.adamw import CONTROL_SIZE, Control, adamw_, adamw_workspace
from scripts.benchmark.machine import facts, synchronize

# read: gradient twice, parameter, two moments; written: the last three, zeroes, 16-bit copy
ADAMW_BYTES = 4 * (2 + 3) + 4 * (3 + 1)
SIZES = {"sd15": 6_776_832, "sdxl": 42_557_440}  # parameters of a LoRA of rank 16 on all linears
TINY_SIZE = 4096
COPY_ELEMENTS = 2**28


@dataclass(frozen=True)
class Timing:
    """How long something takes that moves so many bytes."""

    name: str
    microseconds: float
    bytes: int

    @property
    def gb_per_second(self) -> float:
        """Bandwidth."""
        return self.bytes / self.microseconds / 1e3


def run(options: argparse.Namespace) -> int:
    """Time them and print a table."""
    device = torch.device(options.device)
    for name, fact in facts(device).items():
        print(f"{name}: {fact}")
    copied = _copy(device, COPY_ELEMENTS // 4096 if options.tiny else COPY_ELEMENTS)
    timings = [copied]
    for family, size in ({"tiny": TINY_SIZE} if options.tiny else SIZES).items():
        timings += [_adamw(device, family, size), _torch_adamw(device, family, size)]
    print(f"\n{'what':<48}{'us':>10}{'GB/s':>10}{'of a copy':>12}")
    for one in timings:
        share = one.gb_per_second / copied.gb_per_second
        print(f"{one.name:<48}{one.microseconds:>10.1f}{one.gb_per_second:>10.1f}{share:>12.1%}")
    if options.json:
        content = [asdict(one) | {"gb_per_second": one.gb_per_second} for one in timings]
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def _time(work: Callable[[], object], device: torch.device, times: int = 50) -> float:
    """Microseconds of a call."""
    for _ in range(3):
        work()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(device)
    return 1e6 * (time.perf_counter() - start) / times


def _copy(device: torch.device, elements: int) -> Timing:
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    return Timing("copy", _time(partial(target.copy_, source), device), 2 * source.nbytes)


def _adamw(device: torch.device, family: str, size: int) -> Timing:
    rows = [torch.zeros(size, device=device) for _ in range(4)]
    rows[0].normal_()
    control = torch.zeros(CONTROL_SIZE, device=device)
    control[Control.LR], control[Control.STEP], control[Control.SCALE] = 1e-4, 1, 1
    workspace = adamw_workspace(device)
    work = partial(adamw_, *rows, control=control, workspace=workspace, max_grad_norm=1.0)
    name = f"eri AdamW, {family}: {size} parameters"
    return Timing(name, _time(work, device), size * ADAMW_BYTES)


def _torch_adamw(device: torch.device, family: str, size: int) -> Timing:
    """Clip and fused AdamW on one parameter; its zeroes come on top."""
    parameter = nn.Parameter(torch.randn(size, device=device))
    parameter.grad = torch.zeros_like(parameter)
    capturable = device.type == "cuda"
    optimizer = torch.optim.AdamW([parameter], fused=True, capturable=capturable)

    def work() -> None:
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        optimizer.step()
        assert parameter.grad is not None
        parameter.grad.zero_()

    name = f"PyTorch clip, fused AdamW, zero, {family}"
    return Timing(name, _time(work, device), size * ADAMW_BYTES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`kernels` has no options of its own."""
    del parser

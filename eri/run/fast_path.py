"""Which settings keep a run from the fastest way to train, and why."""

import torch

from eri.config import Config
from eri.models.arrange import Recompute
from eri.run.memory_plan import uses_graphs

__all__ = ["leaves_fast_path", "runs_lean"]


def runs_lean(config: Config, device: torch.device) -> bool:
    """Whether blocks are arranged to keep little for the backward pass; see `eri.models.arrange`.

    Plain modules are what a CPU is tested with and what `reference` asks for, and dropout is theirs
    alone.
    """
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and config.train.backend != "reference"
        and not config.adapter.dropout
    )


def leaves_fast_path(
    config: Config, device: torch.device, dtype: torch.dtype, recompute: Recompute
) -> list[str]:
    """A line for each thing that makes a run slower than it could be on its device.

    Args:
        config: the settings.
        device: where the run computes.
        dtype: in which.
        recompute: what the backward pass computes again.
    """
    if device.type != "cuda":
        return ["a CPU runs plain modules, launched one by one"]
    lines = []
    if config.train.backend == "reference":
        lines.append("train.backend: reference runs plain modules and PyTorch's own kernels")
    if config.adapter.dropout:
        lines.append("adapter.dropout runs plain modules, which keep more for the backward pass")
    if not uses_graphs(runs_lean(config, device), recompute):
        lines.append("plain modules that compute again are launched one by one, not as a graph")
    if dtype == torch.float32:
        lines.append("train.precision: fp32 computes without tensor cores")
    if config.train.deterministic:
        lines.append("train.deterministic takes slower kernels where the fast ones do not repeat")
    return lines

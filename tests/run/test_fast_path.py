from collections.abc import Callable

import pytest
import torch

from eri.config import Config
from eri.run.fast_path import leaves_fast_path, runs_lean

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def fast(config: Config, change: Callable[..., Config]) -> Config:
    """A config that leaves nothing."""
    return change(config, adapter={"dropout": 0.0})


def test_nothing_is_said_where_nothing_is_left(fast: Config) -> None:
    assert leaves_fast_path(fast, GPU, torch.bfloat16, "nothing") == []
    assert leaves_fast_path(fast, GPU, torch.float16, "blocks") == []
    assert runs_lean(fast, GPU)


def test_a_cpu_has_one_line(fast: Config, change: Callable[..., Config]) -> None:
    slow = change(fast, adapter={"dropout": 0.5}, train={"deterministic": True})
    for config in (fast, slow):
        (line,) = leaves_fast_path(config, CPU, torch.float32, "nothing")
        assert line.startswith("a CPU")
    assert not runs_lean(fast, CPU)


@pytest.mark.parametrize(
    ("changes", "recompute", "keys", "lean"),
    [
        ({"adapter": {"dropout": 0.1}}, "nothing", ["adapter.dropout"], False),
        ({"adapter": {"dropout": 0.1}}, "blocks", ["adapter.dropout", "plain modules"], False),
        ({"train": {"backend": "reference"}}, "nothing", ["train.backend"], False),
        ({"train": {"deterministic": True}}, "blocks", ["train.deterministic"], True),
    ],
)
def test_each_setting_has_a_line(
    fast: Config,
    change: Callable[..., Config],
    changes: dict,
    recompute: str,
    keys: list[str],
    lean: bool,
) -> None:
    config = change(fast, **changes)
    lines = leaves_fast_path(config, GPU, torch.bfloat16, recompute)  # type: ignore[arg-type]
    assert len(lines) == len(keys)
    assert all(line.startswith(key) for line, key in zip(lines, keys, strict=True))
    assert runs_lean(config, GPU) is lean


def test_float32_on_a_gpu_is_told(fast: Config) -> None:
    (line,) = leaves_fast_path(fast, GPU, torch.float32, "nothing")
    assert line.startswith("train.precision: fp32")

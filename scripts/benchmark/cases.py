"""Everybody's training step by its name: `eri`, `eri:recompute=blocks,micro=2`, `compiled`, …"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from eri.run.micro_batch import SampleBatch
from scripts.benchmark.problem import Problem

DIFFUSERS = ("eager", "checkpointed", "graph", "compiled", "compiled-in-parts")
KOHYA = ("kohya", "kohya-checkpointed", "kohya-bf16")
ONETRAINER = ("onetrainer", "onetrainer-checkpointed", "onetrainer-compiled")
NAMES = ("eri", *DIFFUSERS, *KOHYA, *ONETRAINER)


class Case(Protocol):
    """A training step."""

    compiled: bool  # by PyTorch's compiler, so that the bytes it moves cannot be counted

    def step(self) -> None:
        """Begin the next update, as fast as the case goes."""
        ...

    def eager_step(self) -> None:
        """The same, operation by operation."""
        ...

    def train_on(self, batch: SampleBatch) -> float:
        """Update from a batch, with the noise that eri draws for it; its loss."""
        ...

    def prediction(self, batch: SampleBatch) -> Tensor:
        """What the net says of a batch."""
        ...

    def gradients(self, batch: SampleBatch, scale: float = 1.0) -> dict[str, Tensor]:
        """Of each LoRA matrix, by `<module in diffusers>.down` and `.up`."""
        ...

    def matrices(self) -> dict[str, Tensor]:
        """The LoRA, by the same names."""
        ...


@dataclass(frozen=True)
class Checkouts:
    """Where the sources of other trainers are; None where they are not."""

    kohya: Path | None = None
    onetrainer: Path | None = None


def parse(text: str) -> tuple[str, dict[str, str]]:
    """A case's name and its options.

    Raises:
        ValueError: there is no such case, or the options cannot be read.
    """
    name, _, rest = text.partition(":")
    if name not in NAMES:
        raise ValueError(f"no case {name!r}; there are {', '.join(NAMES)}")
    options = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{text}: expected option=value, found {part!r}")
        options[key] = value
    if options and name != "eri":
        raise ValueError(f"{text}: only eri has options")
    return name, options


def build(text: str, problem: Problem, checkouts: Checkouts = Checkouts()) -> Case:
    """Build a case on the problem's device.

    Raises:
        ValueError: there is no such case or option, or the checkout that it needs was not named.
    """
    name, options = parse(text)
    if name == "eri":
        from scripts.benchmark.eri_case import EriCase  # each case loads its own libraries alone

        return EriCase(problem, options)
    if name in DIFFUSERS:
        return _diffusers(name, problem)
    source: Mapping[str, Path | None] = vars(checkouts)
    owner = name.partition("-")[0]
    path = source[owner]
    if path is None:
        raise ValueError(f"{name} needs a checkout: --{owner} PATH")
    from scripts.benchmark import foreign

    return foreign.build(name, problem, path)


def _diffusers(name: str, problem: Problem) -> Case:
    from scripts.benchmark import peers

    if name in ("eager", "checkpointed"):
        return peers.eager(problem, checkpointed=name == "checkpointed")
    compiled = name.startswith("compiled")
    return peers.graph(problem, compiled=compiled, whole=name == "compiled")

"""Gradients of every LoRA matrix, of eri and of diffusers with PEFT, against float32.

The reference is diffusers with PEFT in float32 without TF32 and with attention written out, on the
same latents, noises, timesteps, texts, LoRA matrices and weights, which are exact in bfloat16.
Errors are relative to the reference's gradient, root mean squares over the draws.

What passes: an error of eri at most 1.1 times that of diffusers with PEFT. By how much its cosine
is lower or higher is told beside it.
"""

import argparse
import gc
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from eri.run.micro_batch import SampleBatch
from scripts.benchmark.cases import Case, build
from scripts.benchmark.families import FAMILIES, family_of
from scripts.benchmark.problem import Problem, batch_of, random_samples
from scripts.benchmark.worker import DTYPES, reason

ALLOWED = 1.1  # times the error of the other side
FIRST_SCALE = 2.0**16  # of fp16's loss; halved until nothing overflows

Gradients = dict[str, Tensor]
"""Of each matrix, float32 on the CPU."""


@dataclass(frozen=True)
class Errors:
    """How far some gradients are from the reference's."""

    whole: float  # of all matrices together, relative
    cosine: float  # between the whole gradients
    each: dict[str, float]  # relative, by matrix

    @property
    def worst(self) -> str:
        """The matrix with the largest error."""
        return max(self.each, key=lambda name: self.each[name])


def run(options: argparse.Namespace) -> int:
    """Compare, print, and say by 1 that eri's error is larger than it may be."""
    family = family_of(options.family, tiny=options.tiny)
    side = options.resolution // 8 if options.resolution else family.side
    device = torch.device(options.device)
    problem = Problem(family, options.batch, device, DTYPES[options.dtype], side=side)
    samples = random_samples(family, side)
    batches = [batch_of(samples, draw, options.batch) for draw in range(options.draws)]
    print(
        f"{options.family}{' (tiny)' if options.tiny else ''} {8 * side}², {options.dtype}, "
        f"{options.draws} draws of batch {options.batch}, against float32",
        flush=True,
    )
    expected = _reference(problem, batches)
    found: dict[str, Errors] = {}
    for name in options.cases:
        try:
            gradients = _gradients(lambda name=name: build(name, problem), batches, problem.dtype)
        except Exception as error:  # noqa: BLE001 - the other sides are still worth having
            print(f"{name}: failed: {reason(error)}", flush=True)
            continue
        found[name] = errors(gradients, expected)
        print(_row(name, found[name]), flush=True)
    passed = [_compare(name, found, options.against) for name in found if name != options.against]
    if options.json:
        content = {name: asdict(one) for name, one in found.items()}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if passed and all(passed) else 1


def errors(found: Sequence[Gradients], expected: Sequence[Gradients]) -> Errors:
    """The errors of the gradients of some draws.

    Raises:
        ValueError: they are not of the same matrices.
    """
    if any(mine.keys() != theirs.keys() for mine, theirs in zip(found, expected, strict=True)):
        raise ValueError("gradients of other matrices than the reference's")
    apart, size, mine_size, both = {}, {}, 0.0, 0.0
    for name in expected[0]:
        mine = torch.cat([one[name].flatten() for one in found]).double()
        theirs = torch.cat([one[name].flatten() for one in expected]).double()
        apart[name] = (mine - theirs).square().sum().item()
        size[name] = theirs.square().sum().item()
        mine_size += mine.square().sum().item()
        both += (mine * theirs).sum().item()
    total = sum(size.values())
    return Errors(
        whole=math.sqrt(sum(apart.values()) / total),
        cosine=both / math.sqrt(mine_size * total),
        each={name: math.sqrt(apart[name] / size[name]) for name in apart},
    )


def _reference(problem: Problem, batches: Sequence[SampleBatch]) -> list[Gradients]:
    """In float32; checkpointing computes the same in less memory."""
    in_float32 = replace(problem, dtype=torch.float32)
    with _exactly():
        return _gradients(lambda: build("checkpointed", in_float32), batches, torch.float32)


@contextmanager
def _exactly() -> Iterator[None]:
    """Without TF32, and with attention as matrix products."""
    libraries = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [library.allow_tf32 for library in libraries]
    for library in libraries:
        library.allow_tf32 = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for library, allowed in zip(libraries, before, strict=True):
            library.allow_tf32 = allowed


def _gradients(
    make: Callable[[], Case], batches: Sequence[SampleBatch], dtype: torch.dtype
) -> list[Gradients]:
    """Of each batch; the case is gone afterwards."""
    case = make()
    found = [_unscaled(case, batch, dtype) for batch in batches]
    del case
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def _unscaled(case: Case, batch: SampleBatch, dtype: torch.dtype) -> Gradients:
    scale = FIRST_SCALE if dtype == torch.float16 else 1.0
    while True:
        found = case.gradients(batch, scale)
        if all(tensor.isfinite().all() for tensor in found.values()):
            return found
        if scale < 1 or dtype != torch.float16:
            raise ValueError("the gradient is not finite")
        scale /= 2


def _row(name: str, one: Errors) -> str:
    """What is told of a side."""
    typical, worst = median(one.each.values()), one.each[one.worst]
    return (
        f"{name:<28} whole {one.whole:.5f}  cosine {one.cosine:.7f}  "
        f"median {typical:.5f}  worst {worst:.5f} ({one.worst})"
    )


def _compare(name: str, found: Mapping[str, Errors], against: str) -> bool:
    """Say how a side's errors are to another's; whether they may be so."""
    if against not in found:
        return False
    mine, theirs = found[name], found[against]
    ratios = sorted(mine.each[matrix] / theirs.each[matrix] for matrix in mine.each)
    above = sum(ratio > ALLOWED for ratio in ratios)
    passed = mine.whole <= ALLOWED * theirs.whole
    apart = mine.cosine - theirs.cosine
    print(
        f"{name} to {against}: error {mine.whole / theirs.whole:.3f} times, of single matrices "
        f"{median(ratios):.3f} in the median, {ratios[-1]:.3f} at most, {above} of {len(ratios)} "
        f"above {ALLOWED}; cosine {'lower' if apart < 0 else 'higher'} by {abs(apart):.1e}: "
        f"{'passes' if passed else 'FAILS'}"
    )
    return passed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gradients`."""
    parser.add_argument("--family", choices=tuple(FAMILIES), default="sdxl")
    parser.add_argument("--resolution", type=int, help="in pixels; default: the family's own")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--draws", type=int, default=2, help="batches whose gradients are compared")
    parser.add_argument("--cases", nargs="+", default=["eager", "eri"])
    parser.add_argument("--against", default="eager", help="the case whose error is the measure")

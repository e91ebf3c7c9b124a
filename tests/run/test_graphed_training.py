"""A small SDXL on a GPU: what it learns is the same whether its steps are recorded or just run."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from eri.adapters import Adapter, attach
from eri.config import load_config
from eri.diffusion import NoiseSchedule
from eri.errors import NonFiniteError, Stopped
from eri.formats.tensors import load_tensors
from eri.layers.adamw import Control
from eri.models import load_unet
from eri.models.arrange import RECOMPUTE, arrange
from eri.models.unet import UNetSpec
from eri.run.device import set_arithmetic
from eri.run.halving import Halving
from eri.run.objective import Objective, Sample, SampleBatch
from eri.run.train import train
from eri.train import Graphs, Pending, Step, StepNumbers, TrainState, Workspace
from tests.run.conftest import Screen, stop_after, write_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
]

STEPS = 20
SHAPES = [(4, 16, 8), (4, 8, 16), (4, 16, 16)]
BATCH = 2  # of a micro-batch, of which a step has two


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    set_arithmetic(deterministic=True)
    yield
    set_arithmetic(deterministic=False)


@dataclass(frozen=True)
class Session:
    """What trains, begun anew."""

    adapter: Adapter
    state: TrainState
    step: Step
    spec: UNetSpec

    def learn(self, steps: range) -> list[StepNumbers]:
        """Train some steps as the loop does, two steps ahead of what is known of them."""
        found: list[StepNumbers] = []
        running: list[Pending] = []
        for number in steps:
            running.append(self.step(batches(self.spec, number), 1e-2))
            self.state.step += 1
            if len(running) > 2:
                found.append(running.pop(0).result())
        return found + [pending.result() for pending in running]

    def result(self) -> tuple[Any, ...]:
        flat = self.state.flat
        kept = (flat.master, flat.exp_avg, flat.exp_avg_sq)
        return self.state.numbers(), [buffer.cpu() for buffer in kept]


def begin(
    folder: Path,
    dtype: torch.dtype,
    *,
    most: int = 32,
    device: str = "cuda",
    dropout: float = 0.0,
    **arrangement: Any,
) -> Session:
    unet = load_unet(folder, dtype=dtype, device=torch.device(device))
    adapter = attach(unet, rank=4, alpha=4, dropout=dropout)
    arrange(unet.train(), **({"lean": dropout == 0} | arrangement))
    trained = TrainState(adapter.flatten(), scaling=dtype == torch.float16)
    loss = Objective(unet, NoiseSchedule(), seed=0, drops=dropout > 0)
    graphs = Graphs(Workspace(torch.device(device)), most) if device == "cuda" else None
    update = Step(trained, loss, weight_decay=0.01, max_grad_norm=1.0, graphs=graphs)
    return Session(adapter, trained, update, unet.spec)


def batches(spec: UNetSpec, number: int) -> list[SampleBatch]:
    """Those of a step: two of one shape each, which take turns."""
    found = []
    for place in range(2):
        shape = SHAPES[(number + place * (number % 2)) % len(SHAPES)]
        first = (2 * number + place) * BATCH
        numbers = range(first, first + BATCH)
        found.append(SampleBatch([sample(spec, n, shape) for n in numbers], numbers))
    return found


def sample(spec: UNetSpec, number: int, shape: tuple[int, ...]) -> Sample:
    draws = torch.Generator().manual_seed(number % 7)
    return Sample(
        str(number),
        torch.randn(shape, generator=draws),
        torch.rand(shape, generator=draws),
        torch.randn(77, spec.context_dim, generator=draws),
        torch.randn(spec.pooled_dim or 0, generator=draws),
        torch.tensor([128.0, 64, 0, 0, 128, 64]),
    )


def same(one: Session, other: Session, numbers: Sequence[Sequence[StepNumbers]]) -> None:
    """Bit by bit; as text, because no NaN equals another."""
    assert repr(numbers[0]) == repr(numbers[1])
    (known, mine), (also_known, theirs) = one.result(), other.result()
    assert known == also_known
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)


def compared(folder: Path, dtype: torch.dtype, **settings: Any) -> Session:
    """A session with graphs, after it was found to be the same as one without."""
    recorded, run = begin(folder, dtype, **settings), begin(folder, dtype, most=0, **settings)
    numbers = [session.learn(range(STEPS)) for session in (recorded, run)]
    assert recorded.step.graphs is not None and run.step.graphs is not None
    assert (len(recorded.step.graphs), len(run.step.graphs)) == (2 * len(SHAPES), 0)
    same(recorded, run, numbers)
    losses = torch.tensor([one.loss for one in numbers[0]])
    assert losses.isfinite().all() and len(losses.unique()) == STEPS
    return recorded


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_graphs_change_no_bit(sdxl: Path, dtype: torch.dtype, recompute: str) -> None:
    session = compared(sdxl, dtype, recompute=recompute)
    assert session.state.control[Control.UPDATES] == STEPS
    fresh = begin(sdxl, dtype).state.flat
    assert not torch.equal(session.state.flat.master, fresh.master)


def test_nor_do_they_where_blocks_are_plain_modules(sdxl: Path) -> None:
    compared(sdxl, torch.bfloat16, lean=False)


def test_nor_do_they_where_adapters_drop_their_input(sdxl: Path) -> None:
    """Draws come from the sample's number, in a graph as well."""
    with_dropout = compared(sdxl, torch.float32, dropout=0.5)
    without = begin(sdxl, torch.float32)
    without.learn(range(STEPS))
    assert not torch.allclose(with_dropout.state.flat.master, without.state.flat.master)


def test_an_overflow_in_fp16_takes_an_update_and_halves_the_scale(
    sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eri.train.state.FIRST_SCALE", 2.0**30)
    monkeypatch.setattr("eri.train.step.GROWTH_INTERVAL", 4)
    numbers = compared(sdxl, torch.float16).state.numbers()
    skipped = STEPS - int(numbers["updates"])  # type: ignore[call-overload]
    assert 2 <= skipped <= STEPS - 5  # some, and then it trained
    assert numbers["step"] == STEPS

    session = begin(sdxl, torch.float16)
    scales, before = [], session.state.flat.master.clone()
    for at in range(STEPS):
        session.learn(range(at, at + 1))
        scales.append(session.state.control[Control.SCALE].item())
        if not session.state.control[Control.UPDATES]:
            assert torch.equal(session.state.flat.master, before)
            assert scales[-1] == 2.0 ** (29 - at)
    assert scales[-1] == numbers["scale"]
    assert any(later > earlier for earlier, later in pairwise(scales))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cut", [1, 9])
def test_a_state_that_was_carried_over_goes_on_bit_by_bit(
    sdxl: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, cut: int
) -> None:
    monkeypatch.setattr("eri.train.state.FIRST_SCALE", 2.0**30)
    monkeypatch.setattr("eri.train.step.GROWTH_INTERVAL", 4)
    straight, stopped, resumed = (begin(sdxl, dtype) for _ in range(3))
    numbers = straight.learn(range(STEPS))
    first = stopped.learn(range(cut))
    resumed.adapter.load_state_dict({n: t.cpu() for n, t in stopped.adapter.state_dict().items()})
    resumed.state.load(
        {name: tensor.cpu() for name, tensor in stopped.state.optimizer_tensors().items()},
        json.loads(json.dumps(stopped.state.numbers())),
    )
    same(resumed, straight, (first + resumed.learn(range(cut, STEPS)), numbers))


def test_a_step_that_is_not_finite_changes_nothing_nor_do_those_after_it(
    sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = begin(sdxl, torch.bfloat16)
    session.learn(range(6))
    before = session.result()
    update = session.step
    draw = update.loss.draw
    factors = iter([torch.nan, 1.0, 1.0, 1.0, 1.0, 1.0])

    def wrong(batch: SampleBatch) -> dict[str, torch.Tensor]:
        inputs = dict(draw(batch))
        return inputs | {"mean": inputs["mean"] * next(factors)}

    monkeypatch.setattr(update.loss, "draw", wrong)
    pending = []
    for number in range(6, 9):
        pending.append(update(batches(session.spec, number), 1e-2))
        session.state.step += 1
    with pytest.raises(NonFiniteError) as error:
        pending[0].result()
    assert error.value.where == "step 7"
    assert session.state.control[Control.BAD] == 7
    after = session.result()
    assert after[0] == before[0] | {"step": 9}
    assert all(torch.equal(a, b) for a, b in zip(after[1], before[1], strict=True))


def test_a_step_without_memory_goes_on_in_halves_and_is_recorded_again(
    sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit what it is where it was so divided from that step on."""
    short, divided = begin(sdxl, torch.bfloat16), begin(sdxl, torch.bfloat16)
    said: list[str] = []
    halving = Halving(short.step, mode="auto", at_once=None, say=said.append, halved=lambda n: None)
    assert short.step.graphs is not None
    numbers = [session.learn(range(STEPS)) for session in (short, divided)]
    assert len(short.step.graphs) == 2 * len(SHAPES)
    replay = Graphs.__call__

    def full(self: Graphs, run: Any, inputs: Any) -> None:
        """The second micro-batch does not fit; the gradients of the first are there by then."""
        if len(inputs["mean"]) > 1 and run == short.step._run_and_update:
            raise torch.OutOfMemoryError("CUDA out of memory")
        replay(self, run, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(Graphs, "__call__", full)
        for at in range(STEPS, 2 * STEPS):
            numbers[0].append(halving(batches(short.spec, at), 1e-2).result())
            short.state.step += 1
    assert len(said) == 1
    assert len(short.step.graphs) == 2 * len(SHAPES)  # of the halves
    for at in range(STEPS, 2 * STEPS):
        parts = [part for batch in batches(divided.spec, at) for part in batch.parts(1)]
        numbers[1].append(divided.step(parts, 1e-2).result())
        divided.state.step += 1
    same(short, divided, numbers)


def test_what_the_graphs_held_is_given_back(sdxl: Path) -> None:
    session = begin(sdxl, torch.bfloat16)
    session.learn(range(6))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    session.step.make_room()
    assert torch.cuda.memory_reserved() < before
    assert session.step.graphs is not None and len(session.step.graphs) == 0
    straight = begin(sdxl, torch.bfloat16)
    straight.learn(range(6))
    same(session, straight, [s.learn(range(6, STEPS)) for s in (session, straight)])


def digest(run: Path) -> dict[str, bytes]:
    """The bytes of all that the newest checkpoint of a run holds."""
    newest = max(run.glob("checkpoint-*"))
    tensors = {
        f"{file}:{name}": tensor.numpy().tobytes()
        for file in ("adapter.safetensors", "optimizer.safetensors")
        for name, tensor in load_tensors(newest / file).items()
    }
    return tensors | {"state": (newest / "state.json").read_bytes()}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_deterministic_run_that_was_stopped_ends_bit_by_bit_as_one_that_was_not(
    sdxl: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Any,
    precision: str,
) -> None:
    """40 steps of the whole command, with graphs, cut after 17; another seed ends elsewhere."""
    monkeypatch.setenv("ERI_CACHE", str(tmp_path / "cache"))
    recorded: list[int] = []
    record = Graphs._record

    def counted(self: Graphs, *given: Any) -> Any:
        recorded.append(1)
        return record(self, *given)

    monkeypatch.setattr(Graphs, "_record", counted)
    train_settings = {"deterministic": True, "precision": precision}
    config = change(
        load_config(write_config(tmp_path, sdxl, steps=40)),
        adapter={"dropout": 0.0},
        train=train_settings,
        sample={"every": 0},
    )

    def run(name: str, **settings: object) -> Path:
        mine = change(config, output=tmp_path / name, train=train_settings | settings)
        train(mine, Screen().console)
        return mine.output

    straight, other = run("straight"), run("other", seed=1)
    with monkeypatch.context() as patch:
        stop_after(patch, 17)
        with pytest.raises(Stopped):
            run("stopped")
    assert max((tmp_path / "stopped").glob("checkpoint-*")).name == "checkpoint-000017"
    assert digest(run("stopped")) == digest(straight)
    assert digest(straight) != digest(other)
    assert recorded

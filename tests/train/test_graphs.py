"""Functions on a GPU, recorded once and replayed: nothing about what they compute may change."""

import threading
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from torch import Tensor

from eri.train import Graphs, Workspace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
]

MIB = 2**20
WIDTH = 64
SHAPES = [(8, WIDTH), (32, WIDTH), (2, 4, WIDTH)]


class Work:
    """A function with a backward pass that changes tensors, as a step does."""

    def __init__(self) -> None:
        draws = torch.Generator().manual_seed(0)
        self.calls = 0
        self.weight = torch.randn(WIDTH, WIDTH, generator=draws).cuda().requires_grad_(True)
        self.weight.grad = torch.zeros_like(self.weight)
        self.total = torch.zeros((), device="cuda")

    def __call__(self, inputs: Mapping[str, Tensor]) -> None:
        self.calls += 1
        y = (inputs["x"] @ self.weight).sin() * inputs.get("factor", 1.0)
        y.square().sum().backward()
        with torch.no_grad():
            self.total.add_(y.sum())
            self.weight.add_(self.weight.grad, alpha=-1e-3)

    def results(self) -> list[Tensor]:
        return [self.weight.detach().cpu(), self.weight.grad.cpu(), self.total.cpu()]


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def workspace() -> Workspace:
    return Workspace(torch.device("cuda"))


def inputs_of(count: int, *shapes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    draws = torch.Generator().manual_seed(1)
    shapes = shapes or tuple(SHAPES)
    return [{"x": torch.randn(shapes[n % len(shapes)], generator=draws)} for n in range(count)]


def eager(inputs: list[dict[str, Tensor]]) -> list[Tensor]:
    work = Work()
    for one in inputs:
        work({name: tensor.cuda() for name, tensor in one.items()})
    return work.results()


def test_it_runs_then_is_recorded_then_is_replayed(workspace: Workspace) -> None:
    graphs, work = Graphs(workspace), Work()
    seen = []
    for one in inputs_of(5, SHAPES[0]):
        graphs(work, one)
        seen.append((work.calls, len(graphs)))
    assert seen == [(1, 0), (2, 1), (2, 1), (2, 1), (2, 1)]


@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_results_are_those_of_just_running_bit_by_bit(
    workspace: Workspace, count: int, where: str
) -> None:
    graphs, work, inputs = Graphs(workspace), Work(), inputs_of(count)
    for one in inputs:
        graphs(work, {name: tensor.to(where) for name, tensor in one.items()})
    for mine, theirs in zip(work.results(), eager(inputs), strict=True):
        assert torch.equal(mine, theirs)


def test_inputs_may_change_as_soon_as_they_were_given(workspace: Workspace) -> None:
    graphs, work, inputs = Graphs(workspace), Work(), inputs_of(6, (512, WIDTH))
    for one in inputs:
        mine = one["x"].cuda()
        graphs(work, {"x": mine})
        mine.fill_(torch.nan)
        del mine
        torch.full((512, WIDTH), torch.nan, device="cuda")
    for mine, theirs in zip(work.results(), eager(inputs), strict=True):
        assert torch.equal(mine, theirs)


def test_each_name_type_shape_and_function_has_its_graph(workspace: Workspace) -> None:
    graphs, one, other = Graphs(workspace), Work(), Work()
    x = torch.randn(8, WIDTH)
    kinds = [
        (one, {"x": x}),
        (one, {"x": x, "factor": torch.ones(8, 1)}),
        (one, {"x": x, "factor": torch.ones(1)}),
        (one, {"x": x, "factor": torch.ones(1, dtype=torch.int64)}),
        (other, {"x": x}),
    ]
    for _ in range(2):
        for work, inputs in kinds:
            graphs(work, inputs)
    assert len(graphs) == len(kinds)
    assert (one.calls, other.calls) == (8, 2)


def test_methods_of_one_object_are_one_function_each(workspace: Workspace) -> None:
    class Pair:
        def __init__(self) -> None:
            self.sums = torch.zeros(2, device="cuda")

        def first(self, inputs: Mapping[str, Tensor]) -> None:
            self.sums[0] += inputs["x"].sum()

        def second(self, inputs: Mapping[str, Tensor]) -> None:
            self.sums[1] -= inputs["x"].sum()

    graphs, pair = Graphs(workspace), Pair()
    for _ in range(4):
        for run in (pair.first, pair.second):
            graphs(run, {"x": torch.ones(3)})
    assert len(graphs) == 2
    assert pair.sums.tolist() == [12, -12]


def large(elements: int) -> dict[str, Tensor]:
    return {"x": torch.ones(elements // 1024, 1024)}


class Large:
    """A function that takes some times the memory of its input."""

    def __init__(self) -> None:
        self.total = torch.zeros((), device="cuda")

    def __call__(self, inputs: Mapping[str, Tensor]) -> None:
        kept = [inputs["x"] + n for n in range(8)]
        self.total.add_(sum(one.mean() for one in kept))


def taken(workspace: Workspace, graphs: Graphs, kinds: list[dict[str, Tensor]]) -> list[int]:
    """The bytes reserved after each kind was recorded, beyond those before, inputs left out."""
    work = Large()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before, found, inputs = torch.cuda.memory_reserved(), [], 0
    for kind in kinds:
        for _ in range(2):
            graphs(work, kind)
        inputs += sum(tensor.nbytes for tensor in kind.values())
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        found.append(torch.cuda.memory_reserved() - before - inputs)
    return found


def test_graphs_of_other_shapes_share_their_memory(workspace: Workspace) -> None:
    million = 2**20
    kinds = [large(elements) for elements in (16 * million, 12 * million, 14 * million)]
    kinds += [{"x": torch.ones(8 * million, 2)}, {"x": torch.ones(2, 8 * million)}]
    graphs = Graphs(workspace)
    first, *others = taken(workspace, graphs, kinds)
    assert len(graphs) == len(kinds)
    assert first >= 8 * 64 * MIB
    assert max(others) <= 1.1 * first


def test_larger_shapes_that_come_later_do_not_add_up_either(workspace: Workspace) -> None:
    kinds = [large(n * 2**20) for n in (12, 13, 14, 15, 16)]  # as cuts of like areas do
    graphs = Graphs(workspace)
    sizes = taken(workspace, graphs, kinds)
    assert len(graphs) == len(kinds)
    alone = 10 * 64 * MIB  # of the last one: eight results and what becomes of them
    assert sizes[-1] <= 1.5 * alone, [size // MIB for size in sizes]


def test_of_too_many_shapes_the_last_just_run(workspace: Workspace) -> None:
    said: list[str] = []
    graphs, work = Graphs(workspace, most=2, say=said.append), Work()
    order = [0, 0, 1, 1, 0, 2, 2, 0, 1, 2]  # 2 finds no place, however often it comes
    inputs = [inputs_of(1, SHAPES[place])[0] for place in order]
    calls = []
    for one in inputs:
        graphs(work, one)
        calls.append(work.calls)
        assert len(graphs) <= 2
    assert calls == [1, 2, 3, 4, 4, 5, 6, 6, 6, 7]
    assert len(said) == 1 and said[0].startswith("note: 2 kinds of steps are recorded")
    for mine, theirs in zip(work.results(), eager(inputs), strict=True):
        assert torch.equal(mine, theirs)


def test_with_none_allowed_nothing_is_recorded(workspace: Workspace) -> None:
    graphs, work, inputs = Graphs(workspace, most=0), Work(), inputs_of(6)
    for one in inputs:
        graphs(work, one)
    assert (work.calls, len(graphs)) == (6, 0)
    for mine, theirs in zip(work.results(), eager(inputs), strict=True):
        assert torch.equal(mine, theirs)


def test_work_between_replays_disturbs_nothing(workspace: Workspace) -> None:
    graphs, work, inputs = Graphs(workspace), Work(), inputs_of(15, (4096, WIDTH), (2048, WIDTH))
    other, found = Work(), []
    for number, one in enumerate(inputs):
        graphs(work, one)
        with workspace():  # as previews and measurements do, in the memory of the graphs
            rubbish = [torch.full((4096 + number, WIDTH), torch.nan, device="cuda") for _ in "1234"]
            other({"x": one["x"].cuda()})
            found.append(sum(part.isnan().sum().item() for part in rubbish))
            del rubbish
    wanted = eager(inputs)
    for mine, theirs in zip(work.results(), wanted, strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(other.results(), wanted, strict=True):  # nor is it disturbed
        assert torch.equal(mine, theirs)
    assert found == [4 * (4096 + number) * WIDTH for number in range(15)]


def test_work_between_replays_takes_the_memory_of_the_graphs(workspace: Workspace) -> None:
    graphs = Graphs(workspace)
    (first,) = taken(workspace, graphs, [large(16 * 2**20)])
    before = torch.cuda.memory_reserved()
    with workspace():
        for _ in range(6):
            torch.ones(64 * MIB // 4, device="cuda").add_(1)
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() == before
    assert first >= 8 * 64 * MIB


def test_what_is_asked_before_and_after_comes_before_and_after(workspace: Workspace) -> None:
    total = torch.zeros(2**22, device="cuda")

    def double(inputs: Mapping[str, Tensor]) -> None:
        for _ in range(50):  # long enough that the order would show
            total.mul_(1.0)
        total.mul_(2).add_(inputs["x"])

    graphs, wanted = Graphs(workspace), 0.0
    for number in range(6):
        total.add_(number)
        graphs(double, {"x": torch.ones(1)})
        wanted = 2 * (wanted + number) + 1
        assert total[-1:].cpu().item() == wanted


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_waits_for_the_device(workspace: Workspace) -> None:
    """Once it is recorded; the driver may be asked to tell of any wait."""
    graphs, work = Graphs(workspace), Work()
    *first, last = inputs_of(4, (256, WIDTH))
    pinned = {"x": last["x"].pin_memory()}
    for one in first:
        graphs(work, one)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        graphs(work, pinned)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_other_threads_may_pin_memory_while_it_records(workspace: Workspace) -> None:
    done, failed, kept = threading.Event(), [], []

    def pin() -> None:
        size = MIB
        while not done.is_set():
            try:
                kept.append(torch.empty(size, dtype=torch.uint8).pin_memory())
            except RuntimeError as error:
                failed.append(error)
                return
            size += 4096
            if len(kept) > 16:
                kept.clear()

    def slow(inputs: Mapping[str, Tensor]) -> None:
        work(inputs)
        done.wait(0.2)

    work, graphs = Work(), Graphs(workspace)
    inputs = inputs_of(6)
    thread = threading.Thread(target=pin)
    thread.start()
    try:
        for one in inputs:
            graphs(slow, one)
    finally:
        done.set()
        thread.join()
    assert not failed
    assert len(graphs) == 3
    for mine, theirs in zip(work.results(), eager(inputs), strict=True):
        assert torch.equal(mine, theirs)


def with_dropout(total: Tensor) -> Callable[[Mapping[str, Tensor]], None]:
    def run(inputs: Mapping[str, Tensor]) -> None:
        total.add_(torch.nn.functional.dropout(inputs["x"], 0.5).sum(0))

    return run


def test_chance_follows_the_seed_of_each_call(workspace: Workspace) -> None:
    totals = [torch.zeros(WIDTH, device="cuda") for _ in range(2)]
    runs = [with_dropout(total) for total in totals]
    graphs = Graphs(workspace)
    for number, one in enumerate(inputs_of(6, SHAPES[0])):
        torch.manual_seed(number)
        graphs(runs[0], one)
        torch.manual_seed(number)
        runs[1]({"x": one["x"].cuda()})
    assert len(graphs) == 1
    assert torch.equal(*totals)

"""How many graphs there are, without a GPU: recordings are stand-ins that run the function."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from eri.train import Graphs


class Still:
    """A workspace of no device."""

    def __call__(self) -> Any:
        return nullcontext()

    def on_stream(self) -> Any:
        return nullcontext()


def recorded(run: Any) -> SimpleNamespace:
    graph = SimpleNamespace(replay=lambda: run({}), reset=lambda: None)
    return SimpleNamespace(graph=graph, inputs={})


@pytest.mark.parametrize(("most", "told"), [(0, 0), (1, 1), (2, 1), (3, 0)])
def test_that_there_is_no_more_room_is_told_once(
    monkeypatch: pytest.MonkeyPatch, most: int, told: int
) -> None:
    monkeypatch.setattr(Graphs, "_record", lambda self, run, inputs: recorded(run))
    said: list[str] = []
    ran: list[int] = []
    runs = [lambda given, number=number: ran.append(number) for number in range(3)]
    graphs = Graphs(Still(), most, said.append)  # type: ignore[arg-type]
    for _ in range(3):
        for run in runs:
            graphs(run, {})
    assert len(graphs) == most and ran == [0, 1, 2] * 3
    assert len(said) == told
    assert all(f"{most} kinds of steps are recorded" in line for line in said)

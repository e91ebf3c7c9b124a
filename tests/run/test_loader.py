from multiprocessing import active_children

import pytest
import torch

from eri.errors import DataError
from eri.run import loader as loader_module
from eri.run.loader import Loader
from eri.run.micro_batch import Packed, Sample, SampleBatch

CPU = torch.device("cpu")


def load(step: int) -> list[SampleBatch]:
    """Two micro-batches, the second one shorter; step 3 fails."""
    if step == 3:
        raise DataError("an entry was removed", where="file 3")
    latents = [torch.full((4, 2, 2), float(10 * step + n)) for n in range(3)]
    samples = [Sample(f"{step} {n}", mean, mean, mean[0]) for n, mean in enumerate(latents)]
    numbers = range(3 * step, 3 * step + 3)
    return [SampleBatch(samples[:2], numbers[:2]), SampleBatch(samples[2:], numbers[2:])]


def seen(batches: list[SampleBatch]) -> list[tuple[str, int, float]]:
    return [
        (sample.file, number, sample.mean.mean().item())
        for batch in batches
        for sample, number in zip(batch.samples, batch.numbers, strict=True)
    ]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.gpu)])
def test_a_step_comes_as_it_was_loaded_on_the_device(device: torch.device, workers: int) -> None:
    steps = range(8)
    with Loader(load, steps=steps, workers=workers, device=device, say=print) as loader:
        for step in (0, 1, 2, 6, 7, 4, 5) if workers == 0 else (0, 1, 2, 4, 5):
            batches = loader(step)
            assert seen(batches) == seen(load(step))
            assert all(s.mean.device.type == device.type for b in batches for s in b.samples)
        with pytest.raises(DataError, match=r"^an entry was removed \(file 3\)$"):
            loader(3)
        with pytest.raises(ValueError, match="step 8"):
            loader(8)
    assert not active_children()


def test_an_error_comes_with_its_own_step(device: torch.device) -> None:
    with Loader(load, steps=range(5), workers=0, device=device, say=print) as loader:
        assert [len(loader(step)) for step in range(3)] == [2, 2, 2]
        for _ in range(2):
            with pytest.raises(DataError):
                loader(3)
        assert seen(loader(4)) == seen(load(4))


class Reader:
    """Stands for workers, and lists which steps were begun and ended."""

    record: list[str]

    def __init__(self, source, steps: range, *, count: int, pin: bool) -> None:
        self.source, self.step = source, steps.start
        self.record.append(f"begun at {steps.start}, to {steps.stop}")

    def read(self):
        self.step += 1
        return self.source[self.step - 1]

    def end(self) -> None:
        self.record.append(f"ended at {self.step}")


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(Reader, "record", [], raising=False)
    monkeypatch.setattr(loader_module, "Workers", Reader)
    return Reader.record


def test_workers_go_on_where_the_run_does(record: list[str]) -> None:
    with Loader(load, steps=range(9), workers=2, device=CPU, say=print) as loader:
        for step in (0, 1, 2, 5, 6, 7, 8):
            assert seen(loader(step)) == seen(load(step))
    assert record == ["begun at 1, to 9", "ended at 3", "begun at 6, to 9", "ended at 9"]


def test_nothing_is_begun_for_nothing(record: list[str]) -> None:
    with Loader(load, steps=range(8, 9), workers=2, device=CPU, say=print) as loader:
        assert seen(loader(8)) == seen(load(8))
    assert not record


def test_without_shared_memory_this_process_reads_and_it_is_told(
    record: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(loader_module, "fits_shared_memory", asked.append)
    said: list[str] = []
    with Loader(load, steps=range(9), workers=3, device=CPU, say=said.append) as loader:
        for step in range(3):
            assert seen(loader(step)) == seen(load(step))
    size = sum(Packed.of(batch).block.nbytes for batch in load(0))
    assert asked == [3 * loader_module.AHEAD * size]
    assert said == ["note: /dev/shm is too small for workers; samples are read without"]
    assert not record

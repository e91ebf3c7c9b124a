"""Processes are slow to start: one test begins them twice, the other one kills their parent."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import synchronize
from pathlib import Path

import pytest
import torch

from eri.errors import DataError, WorkerError
from eri.files import lock
from eri.run import loader as loader_module
from eri.run import workers
from eri.run.loader import Loader
from eri.run.micro_batch import Sample, SampleBatch
from eri.run.workers import Source, Workers, fits_shared_memory, worker_count

ROOT = Path(__file__).parents[2]
HEAVY = ("diffusers", "transformers", "eri.models", "torch._dynamo")
CPU = torch.device("cpu")
FAILS, HANGS = 3, (4, 6)  # steps


class Telling:
    """Samples whose file tells of the process that read them; one fails, and some hang a worker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, step: int) -> list[SampleBatch]:
        if step == FAILS:
            what, hint = "a cached latent was removed", "run the same command again"
            raise DataError(what, where="some/file", hint=hint, problems=["one", "two"])
        if step in HANGS and multiprocessing.parent_process():
            (self.folder / "hangs").touch()
            time.sleep(60)
        return [batch(step, json.dumps(self.told()))]

    def told(self) -> dict[str, object]:
        return {
            "pid": os.getpid(),
            "threads": torch.get_num_threads(),
            "heavy": [name for name in HEAVY if name in sys.modules],
            "open": [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()],
        }


def batch(step: int, file: str = "") -> SampleBatch:
    numbers = range(2 * step, 2 * step + 2)
    latents = [torch.full((4, 2, 2), float(number)) for number in numbers]
    samples = [Sample(file, mean, mean + 1, torch.ones(3, 5)) for mean in latents]
    return SampleBatch(samples, numbers)


def batches(step: int) -> list[SampleBatch]:
    return [batch(step)]


def means(batches: list[SampleBatch]) -> list[float]:
    return [sample.mean.mean().item() for one in batches for sample in one.samples]


def waited(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]
    except OSError:
        return False


def test_workers_read_what_the_run_would_and_may_die(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "MOST_RESTARTS", 1)
    said: list[str] = []
    state, handler = torch.get_rng_state(), signal.getsignal(signal.SIGCHLD)
    load = Telling(tmp_path)

    def kill() -> None:
        for child in multiprocessing.active_children():
            child.kill()

    with (
        lock(tmp_path),
        Loader(load, steps=range(9), workers=2, device=CPU, say=said.append) as loader,
    ):
        assert means(loader(0)) == [0, 1]
        first = loader(1)
        assert means(first) == [2, 3]
        assert list(first[0].numbers) == [2, 3]
        told = json.loads(first[0].files[0])
        assert told["pid"] in {child.pid for child in multiprocessing.active_children()}
        assert (told["threads"], told["heavy"]) == (1, [])
        assert str(tmp_path / "run.lock") in load.told()["open"]
        assert str(tmp_path / "run.lock") not in told["open"]

        for child in multiprocessing.active_children():
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(child.pid, number)
        assert means(loader(2)) == [4, 5]
        with pytest.raises(DataError) as failed:
            loader(FAILS)
        assert str(failed.value) == "a cached latent was removed (some/file)"
        assert failed.value.hint == "run the same command again"
        assert failed.value.problems == ("one", "two")
        assert not said

        kill()
        for child in multiprocessing.active_children():
            child.join()  # nothing is raised here, in the middle of something else
        assert means(loader(4)) == [8, 9]
        (line,) = said
        assert "ended with SIGKILL" in line
        assert "going on from step 5 with new workers" in line
        again = loader(5)
        assert means(again) == [10, 11]
        assert json.loads(again[0].files[0])["pid"] not in {os.getpid(), told["pid"]}

        threading.Timer(0.2, kill).start()
        with pytest.raises(WorkerError, match="SIGKILL") as died:
            loader(6)  # it is waited for when they die
        assert died.value.exit_code == 8
        assert "train.workers: 0" in str(died.value.hint)
        assert len(said) == 1
    assert not multiprocessing.active_children()
    assert torch.equal(torch.get_rng_state(), state)
    assert signal.getsignal(signal.SIGCHLD) is handler


RUN = """
import multiprocessing, pathlib, signal, sys, torch
from eri.run.loader import Loader
from tests.run.test_workers import Telling
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: None)
    load = Telling(pathlib.Path(sys.argv[1]))
    with Loader(load, steps=range(9), workers=1, device=torch.device("cpu"), say=print) as loader:
        loader(0)
        loader(1)
        print(multiprocessing.active_children()[0].pid, flush=True)
        input()
        loader(2)
        print("went on", flush=True)
        input()
"""


def test_workers_take_no_ctrl_c_and_end_with_their_parent(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    with (
        (tmp_path / "stderr").open("w") as stderr,
        subprocess.Popen(
            [sys.executable, script, tmp_path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            start_new_session=True,
        ) as run,
    ):
        assert run.stdin is not None
        assert run.stdout is not None
        try:
            worker = int(run.stdout.readline())
            os.killpg(run.pid, signal.SIGINT)
            print(file=run.stdin, flush=True)
            assert run.stdout.readline() == "went on\n"
            assert waited((tmp_path / "hangs").exists)
            assert runs(worker)
        finally:
            run.kill()
    assert waited(lambda: not runs(worker))
    assert "Traceback" not in (tmp_path / "stderr").read_text()


def test_a_system_without_room_for_processes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(self: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.get_context("spawn").Process, "start", no_room)
    handler = signal.getsignal(signal.SIGCHLD)
    with (
        pytest.raises(WorkerError, match="Resource temporarily unavailable") as failed,
        Loader(batches, steps=range(9), workers=1, device=CPU, say=print) as loader,
    ):
        loader(0)
    assert failed.value.hint == "set train.workers: 0"
    assert signal.getsignal(signal.SIGCHLD) is handler


class Slow:
    """A message that a queue's thread has in hand until it is let go."""

    def __init__(self) -> None:
        self.goes = threading.Event()

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        assert self.goes.wait(20)
        return object, ()


def test_no_thread_takes_down_semaphores(monkeypatch: pytest.MonkeyPatch) -> None:
    message = Slow()
    unlinked: list[threading.Thread] = []

    class Queueing:
        """Stands for PyTorch's: drops a queue that a thread still feeds."""

        def __init__(self, source, *, multiprocessing_context, **_) -> None:
            self.context = multiprocessing_context

        def __iter__(self):
            queue = self.context.Queue()
            queue.put(message)
            queue.cancel_join_thread()
            queue.close()
            return iter(())

    def unlink(name: str) -> None:
        unlinked.append(threading.current_thread())
        synchronize._multiprocessing.sem_unlink(name)

    monkeypatch.setattr(workers, "DataLoader", Queueing)
    monkeypatch.setattr(synchronize, "sem_unlink", unlink)
    before = threading.enumerate()
    Workers(Source(batches), range(9), count=1, pin=False).end()
    (feeds,) = set(threading.enumerate()) - set(before)
    message.goes.set()
    feeds.join()
    assert feeds not in unlinked


def test_auto_is_two_workers_with_a_gpu() -> None:
    settings = [("auto", "cpu"), ("auto", "cuda"), (5, "cpu"), (0, "cuda")]
    assert [worker_count(one, torch.device(device)) for one, device in settings] == [0, 2, 5, 0]


def test_shared_memory_is_asked_for_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fits_shared_memory(1)
    assert not fits_shared_memory(10**15)
    monkeypatch.setattr(workers, "SHARED_MEMORY", Path("/nowhere"))  # no Linux
    assert fits_shared_memory(10**15)

"""Processes that read steps ahead of the run.

They begin by spawn, as fresh Pythons: of the run's process they inherit no lock, no open file
(https://docs.python.org/3/library/multiprocessing.html#contexts-and-start-methods) and no CUDA
context. They only read, so nothing is lost with them.
"""

import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import active_children, parent_process, queues, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from eri.errors import EriError, WorkerError
from eri.run.micro_batch import Packed, SampleBatch

__all__ = ["Load", "Read", "Source", "WorkerDied", "Workers", "fits_shared_memory", "worker_count"]

Load = Callable[[int], list[SampleBatch]]
"""A step to its micro-batches; pure, and for workers picklable."""

Read = Sequence[Packed] | EriError
"""What comes of reading a step."""

AHEAD = 2  # steps that each worker reads ahead
DEATH_TAKES = 1.0  # seconds between a broken pipe and the end of the process at its other end
SHARED_MEMORY = Path("/dev/shm")  # what processes hand each other lies here; Linux
_POSIX = os.name == "posix"
SIGNALS = {signal.SIGINT, signal.SIGTERM}


def worker_count(setting: int | Literal["auto"], device: torch.device) -> int:
    """How many processes read samples: 2 with a GPU, else none, unless `train.workers` says more.

    Without a GPU, what they gain is lost again: they read with the cores that compute.
    """
    if setting != "auto":
        return setting
    return 2 if device.type == "cuda" else 0


def fits_shared_memory(size: int) -> bool:
    """Whether so many bytes may lie between processes, with as many again left free."""
    return not SHARED_MEMORY.is_dir() or 2 * size <= shutil.disk_usage(SHARED_MEMORY).free


class Source(Dataset[Read]):
    """Steps as PyTorch's `DataLoader` asks for them, in a worker."""

    def __init__(self, load: Load) -> None:
        self._load = load

    def __getitem__(self, step: int) -> Read:
        try:
            return [Packed.of(batch) for batch in self._load(step)]
        except EriError as error:
            return error  # raised here, the other side would get a traceback in its place


class _KeepsQueues(SpawnContext):
    """Spawn, whose queues stay until this process exits.

    Else the last to let go of one may be the daemon thread that feeds it, after PyTorch closed it.
    If Python exits between that thread's two steps, to unlink a semaphore and to tell the resource
    tracker, the tracker unlinks it again and warns. At exit, the main thread takes both steps.
    """

    kept: ClassVar[list[object]] = []

    def Queue(self, maxsize: int = 0) -> "queues.Queue[Any]":  # noqa: N802
        queue = super().Queue(maxsize)
        self.kept.append(queue)
        return queue


class WorkerDied(Exception):  # noqa: N818 - the run goes on
    """A worker died; tells of what."""


class Workers:
    """Processes that read some steps ahead, in their order.

    Args:
        source: pickled, and read from in each of them.
        steps: to read.
        count: of processes.
        pin: whether what is read comes in pinned memory.

    Raises:
        WorkerError: the system has no room for more processes.
    """

    def __init__(self, source: Source, steps: range, *, count: int, pin: bool) -> None:
        self.step = steps.start
        """That is read next."""
        others = active_children()
        self._waiting = False  # for a worker
        self._handler = signal.getsignal(signal.SIGCHLD) if _POSIX else None
        self._reads: Iterator[Read] | None = None
        try:
            with _unreachable_by_signals(), _unwarned():
                self._reads = iter(_loader(source, steps, count=count, pin=pin))
        except OSError as error:
            what = f"workers, which read samples ahead, could not begin: {error}"
            raise WorkerError(what, hint="set train.workers: 0") from error
        finally:
            self._processes = [child for child in active_children() if child not in others]
            if self._reads is None:
                self.end()
            else:
                self._handle_deaths(self._raise_if_waiting)

    def read(self) -> Read:
        """What the next step is.

        Raises:
            WorkerDied: a worker did.
        """
        if self._reads is None:
            raise ValueError("these workers were ended")
        try:
            self._waiting = True
            self._raise_if_waiting()  # for one that died before
            found = next(self._reads)
            self._waiting = False
        except (RuntimeError, OSError, EOFError):  # of a death, or from within `load`
            self._waiting = False
            dead = self._dead(within=DEATH_TAKES)
            if not dead:
                raise
        else:
            self.step += 1
            return found
        raise WorkerDied(", ".join(_cause(process) for process in dead))

    def end(self) -> None:
        """End the processes."""
        self._handle_deaths(self._handler)
        try:
            self._reads = None  # PyTorch asks them to end, and waits a little
        finally:
            for process in self._processes:
                process.kill()
                process.join()

    def _raise_if_waiting(self, *_: object) -> None:
        """Stop waiting for a worker that died, once; of a child's death a signal tells.

        PyTorch's own handler raises wherever the run is, in the middle of an update too.
        """
        if self._waiting and self._dead(within=0):
            self._waiting = False
            raise ChildProcessError("a worker died")

    def _handle_deaths(self, handler: Any) -> None:
        if _POSIX and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)

    def _dead(self, within: float) -> list[BaseProcess]:
        ended = wait([process.sentinel for process in self._processes], within)
        return [process for process in self._processes if process.sentinel in ended]


def _loader(source: Source, steps: range, *, count: int, pin: bool) -> DataLoader[Read]:
    return DataLoader(
        source,
        batch_size=None,
        sampler=steps,
        num_workers=count,
        collate_fn=_as_it_is,
        pin_memory=pin,
        multiprocessing_context=_KeepsQueues(),
        prefetch_factor=AHEAD,
        worker_init_fn=_end_with_parent,
        generator=torch.Generator(),  # its seed for the workers: else it draws from PyTorch's
    )


@contextmanager
def _unwarned() -> Iterator[None]:
    """Says nothing of more processes than there are cores: they mostly wait."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        yield


def _cause(process: BaseProcess) -> str:
    process.join()
    code = process.exitcode or 0
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _as_it_is(found: Read) -> Read:
    return found


def _end_with_parent(worker: int) -> None:
    """Make this process end at once when its parent does, whatever it is doing then."""

    def wait_for_the_end() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait_for_the_end, daemon=True).start()


@contextmanager
def _unreachable_by_signals() -> Iterator[None]:
    """Children begun in here never get SIGINT or SIGTERM; what becomes of them, the run decides.

    A signal to the whole group (Ctrl-C, a cluster's time limit) would end them while the run goes
    on to the end of its step.
    """
    if not _POSIX:
        yield
        return
    resource_tracker.ensure_running()  # Python 3.11 unblocks the signals when it begins this one
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

"""Work done in threads ahead of who needs it, so that an encoder need not wait for the disk."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["ahead"]

Task = TypeVar("Task")
Result = TypeVar("Result")

THREADS = 2  # Pillow and hashing let go of the interpreter


@contextmanager
def ahead(
    work: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    threads: int = THREADS,
    depth: int = THREADS,
) -> Iterator[Iterator[Result]]:
    """Yields the results of some tasks in their order, the next few of them worked on meanwhile.

    An error of a task is raised where its result would come; no thread is left behind.

    Args:
        work: makes the result of a task, in a thread.
        tasks: taken as they are needed, a few ahead.
        threads: how many work at a time.
        depth: how many tasks are taken before the result of the first one is.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ahead")
    try:
        yield _in_order(pool, work, tasks, depth)
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[Task], Result], tasks: Iterable[Task], depth: int
) -> Iterator[Result]:
    waiting: deque[Future[Result]] = deque()
    for task in tasks:
        waiting.append(pool.submit(work, task))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()

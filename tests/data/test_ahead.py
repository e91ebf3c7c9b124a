import threading
from collections.abc import Iterator

import pytest

from eri.data.ahead import THREADS, ahead


def test_results_come_in_the_order_of_the_tasks() -> None:
    later_done = threading.Event()

    def work(number: int) -> int:
        if number == 0:
            assert later_done.wait(10)  # a later task overtakes this one
        if number == 1:
            later_done.set()
        return number * number

    with ahead(work, range(20)) as results:
        assert list(results) == [number * number for number in range(20)]


@pytest.mark.parametrize("depth", [THREADS, 7])
def test_only_a_few_tasks_are_taken_ahead(depth: int) -> None:
    taken: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    with ahead(str, tasks(), depth=depth) as results:
        assert taken == []
        for number in range(50):
            assert next(results) == str(number)
            assert len(taken) == number + 1 + depth


@pytest.mark.parametrize("threads", [1, 3])
def test_as_many_threads_work_as_are_asked_for(threads: int) -> None:
    together = threading.Barrier(threads)

    def work(number: int) -> str:
        together.wait(10)
        return threading.current_thread().name

    with ahead(work, range(6), threads=threads, depth=6) as results:
        assert len(set(results)) == threads


def test_an_error_is_raised_in_its_place_and_no_thread_is_left() -> None:
    def work(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    seen: list[int] = []
    with pytest.raises(ValueError, match="three"), ahead(work, range(9)) as results:
        seen.extend(results)
    with pytest.raises(KeyboardInterrupt), ahead(work, range(9)) as results:
        seen.append(next(results))
        raise KeyboardInterrupt
    assert seen[-1] == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_what_is_in_between_is_seen_before_the_error() -> None:
    def work(number: int) -> int:
        return 10 // (3 - number)

    with ahead(work, range(9)) as results:
        assert [next(results) for _ in range(3)] == [3, 5, 10]
        with pytest.raises(ZeroDivisionError):
            next(results)

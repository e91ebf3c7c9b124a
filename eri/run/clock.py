"""Where the time of a run goes, told when it ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

__all__ = ["Clock"]


class Clock:
    """Adds up the wall clock by what was done; what is nested counts for the innermost alone."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {"starting": 0.0}
        self._doing = ["starting"]
        self._since = perf_counter()

    @contextmanager
    def __call__(self, doing: str) -> Iterator[None]:
        """Count what is done within for `doing`."""
        self._count()
        self._doing.append(doing)
        self._seconds.setdefault(doing, 0.0)
        try:
            yield
        finally:
            self._count()
            self._doing.pop()

    def move(self, seconds: float, old: str, new: str) -> None:
        """Count some of what was counted for one thing for another."""
        self._seconds[old] -= seconds
        self._seconds[new] = self._seconds.get(new, 0.0) + seconds

    def told(self) -> str:
        """All of it on one line, in the order in which things were begun."""
        self._count()
        parts = (f"{name} {value:.1f} s" for name, value in self._seconds.items() if value >= 0.05)
        return f"{sum(self._seconds.values()):.1f} s: {', '.join(parts)}"

    def _count(self) -> None:
        now = perf_counter()
        self._seconds[self._doing[-1]] += now - self._since
        self._since = now

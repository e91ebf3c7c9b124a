"""A JSON config of another program, read field by field: what we do not support is refused."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from eri.errors import ModelError
from eri.formats.strict_json import read_object
from eri.printable import printable

__all__ = ["ForeignConfig"]

Word = TypeVar("Word", bound=str)


class ForeignConfig:
    """The fields of one config file; every method names the file and the key in its error.

    A `null` counts as a field that is not there.

    Raises:
        ModelError: from every method, when the value found is not one that is allowed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = {k: v for k, v in read_object(path).items() if v is not None}

    def refuse(self, key: str, allowed: str) -> ModelError:
        """The error that says what a field holds and what it may hold."""
        there = key in self.values
        found = printable(repr(self.values[key]), limit=80) if there else "missing"
        return ModelError(f"{key} is {found}, supported is {allowed}", where=printable(self.path))

    def require_known(self, supported: Mapping[str, Sequence[Any]], fields: Sequence[str]) -> None:
        """Refuse every field that changes what the model computes in a way we do not.

        Args:
            supported: fields that may only hold these values.
            fields: those that are read one by one; names that begin with `_` are notes.
        """
        problems = []
        for key, value in self.values.items():
            if key in fields or key.startswith("_"):
                continue
            if not any(value == allowed for allowed in supported.get(key, ())):
                found = f"{printable(key, limit=80)} is {printable(repr(value), limit=80)}"
                values = ", ".join(map(repr, supported.get(key, ()))) or "none"
                problems.append(f"{found}, supported is {values}")
        if problems:
            raise ModelError(
                f"the config asks for {len(problems)} things that are not supported",
                where=printable(self.path),
                hint="only U-Net models of Stable Diffusion 1, 2 and XL are supported",
                problems=problems,
            )

    def integer(self, key: str, *, default: int | None = None, at_most: int) -> int:
        """A whole number from 1 to `at_most`; without a default the field must be there."""
        value = self.values.get(key, default)
        if type(value) is not int or not 1 <= value <= at_most:
            raise self.refuse(key, f"a whole number from 1 to {at_most:,}")
        return value

    def integers(self, key: str, *, count: int, default: int, at_most: int) -> tuple[int, ...]:
        """`count` whole numbers from 1 to `at_most`; one number stands for all of them."""
        value = self.values.get(key, default)
        numbers = value if isinstance(value, list) else [value] * count
        fine = all(type(number) is int and 1 <= number <= at_most for number in numbers)
        if len(numbers) != count or not fine:
            raise self.refuse(key, f"one or {count} whole numbers from 1 to {at_most:,}")
        return tuple(numbers)

    def nested(
        self, key: str, counts: Sequence[int], *, at_most: int
    ) -> tuple[tuple[int, ...], ...]:
        """A list of `counts[i]` whole numbers from 0 to `at_most` for each i; default 1.

        One number stands for all of a list, or for all of all lists.
        """
        value = self.values.get(key, 1)
        outer = value if isinstance(value, list) else [value] * len(counts)
        rows = [
            tuple(row) if isinstance(row, list) else (row,) * count
            for row, count in zip(outer, counts, strict=False)
        ]
        sized = [len(row) for row in rows] == [*counts] and len(outer) == len(counts)
        if not sized or not all(
            type(number) is int and 0 <= number <= at_most for row in rows for number in row
        ):
            raise self.refuse(key, f"whole numbers from 0 to {at_most}, {list(counts)} of them")
        return tuple(rows)

    def number(
        self, key: str, *, default: float | None = None, between: tuple[float, float]
    ) -> float:
        """A number inside the two ends; without a default the field must be there."""
        value = self.values.get(key, default)
        low, high = between
        if type(value) not in (int, float) or not low < value < high:
            raise self.refuse(key, f"a number between {low:g} and {high:g}")
        return float(value)

    def choice(self, key: str, options: Sequence[Word], *, default: Word | None = None) -> Word:
        """One of some words; without a default the field must be there."""
        value = self.values.get(key, default)
        if value not in options:
            raise self.refuse(key, " or ".join(options))
        return value

    def words(self, key: str, options: Sequence[str]) -> tuple[str, ...]:
        """One to eight words out of some."""
        value = self.values.get(key)
        if (
            not isinstance(value, list)
            or not 1 <= len(value) <= 8
            or not set(map(str, value)) <= {*options}
        ):
            raise self.refuse(key, f"a list of {' and '.join(options)}")
        return tuple(value)

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key, default)
        if type(value) is not bool:
            raise self.refuse(key, "true or false")
        return value

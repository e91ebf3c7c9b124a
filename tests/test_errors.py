import pytest

from eri import errors
from eri.errors import EriError, Stopped

EXIT_CODES = {
    "ConfigError": 2,
    "DataError": 3,
    "ModelError": 4,
    "DiskError": 5,
    "OccupiedError": 6,
    "MemoryLimitError": 7,
    "WorkerError": 8,
    "NonFiniteError": 9,
}


def test_every_error_has_the_exit_code_of_the_contract() -> None:
    found = {error.__name__: error.exit_code for error in EriError.__subclasses__()}
    assert found == EXIT_CODES


def test_every_public_name_is_drawn_in_the_tree() -> None:
    assert errors.__doc__ is not None
    assert [name for name in errors.__all__ if name not in errors.__doc__] == []


def test_an_error_says_what_and_where() -> None:
    error = EriError("rank is 0", where="a.yaml:3", hint="write 16", problems=["one", "two"])
    assert str(error) == "rank is 0 (a.yaml:3)"
    assert (error.what, error.where, error.hint) == ("rank is 0", "a.yaml:3", "write 16")
    assert error.problems == ("one", "two")
    assert str(EriError("rank is 0")) == "rank is 0"


@pytest.mark.parametrize(("signal_number", "code"), [(2, 130), (15, 143)])
def test_a_stopped_run_exits_as_shells_expect(signal_number: int, code: int) -> None:
    assert Stopped(signal_number).exit_code == code
    assert not issubclass(Stopped, EriError)

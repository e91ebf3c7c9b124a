"""Broken safetensors headers: read or refused with exit code 4, in 50 ms and 64 MiB."""

import time
from pathlib import Path

import pytest

from eri.errors import ModelError
from eri.formats import header
from eri.run.inspect import inspect_path
from tests.torture import fuzz
from tests.torture.fuzz import fuzz_headers, fuzz_inspect
from tests.torture.mutations import CORPUS

LEGAL = {"names"}  # of the corpus: whole, but of no module


@pytest.mark.parametrize(("seed", "count", "memory"), [(1, 2500, True), (2, 12_500, False)])
def test_mutated_headers_are_read_or_refused(seed: int, count: int, memory: bool) -> None:
    result = fuzz_headers(count, seed, memory=memory)
    assert not result.broken, result.report()
    assert result.accepted + result.refused == result.cases == count
    assert result.accepted > count / 10, "the mutations no longer leave a header whole"
    assert result.refused > count / 10, "the mutations no longer break a header"
    assert result.slowest < 0.05, result.report()
    assert memory == (0 < result.most_bytes < 64 * 2**20), result.report()


def test_mutated_files_are_told_or_refused_by_inspect(tmp_path: Path) -> None:
    result = fuzz_inspect(400, 3, tmp_path)
    assert not result.broken, result.report()
    assert result.accepted > 0, "no mutated file is still an adapter"
    assert result.refused > 300


@pytest.mark.parametrize("path", sorted((CORPUS / "headers").iterdir()), ids=lambda path: path.stem)
def test_headers_of_the_corpus_are_refused(path: Path) -> None:
    if path.stem not in LEGAL:
        with pytest.raises(ModelError, match="this safetensors file is damaged"):
            header.read_header(path)
    with pytest.raises(ModelError) as refused:
        inspect_path(path)
    assert all(line.isprintable() for line in [str(refused.value), *refused.value.problems])


def test_the_fuzzer_sees_a_leak_a_stall_and_a_hog(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a parser that leaks, that takes too long, or that takes too much, is reported."""
    parse = header._parse

    def leaks(text: bytes, *, data_bytes: int) -> header.Header:
        if b"-0" in text:
            raise KeyError("a leak")
        return parse(text, data_bytes=data_bytes)

    def stalls(text: bytes, *, data_bytes: int) -> header.Header:
        until = time.thread_time() + 0.06
        while time.thread_time() < until:
            pass
        return parse(text, data_bytes=data_bytes)

    def hogs(text: bytes, *, data_bytes: int) -> header.Header:
        bytearray(65 * 2**20)
        return parse(text, data_bytes=data_bytes)

    for broken, words, cases in [(leaks, "KeyError", 1000), (stalls, " ms", 9), (hogs, "bytes", 9)]:
        monkeypatch.setattr(header, "_parse", broken)
        if broken is hogs:  # so much takes its time, too
            monkeypatch.setattr(fuzz, "HEADER_SECONDS", 60.0)
        result = fuzz_headers(cases, 1)
        assert any(words in case.what for case in result.outside), result.report()


def test_a_case_is_made_again_by_its_number() -> None:
    whole, tail = fuzz_headers(40, 5), fuzz_headers(20, 5, start=20)
    head = fuzz_headers(20, 5)
    assert whole.accepted == head.accepted + tail.accepted
    assert whole.refused == head.refused + tail.refused

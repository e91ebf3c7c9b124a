import pickle
from pathlib import Path

import pytest
import torch

from eri.data import texts as texts_module
from eri.data.texts import Texts, TextStates, cache_texts, missing_texts
from eri.errors import DataError, NonFiniteError


class Encoder:
    """Stands for a text encoder: states made of the text's characters; notes what it is asked."""

    def __init__(self, *, pooled: bool = True, dtype: torch.dtype = torch.float32) -> None:
        self.asked: list[str] = []
        self.pooled = pooled
        self.dtype = dtype

    def __call__(self, text: str) -> TextStates:
        self.asked.append(text)
        context = torch.tensor([ord(c) for c in text.ljust(8)[:8]], dtype=self.dtype).view(4, 2)
        return TextStates(context, context[0] if self.pooled else None)


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


@pytest.mark.parametrize("pooled", [True, False])
def test_states_are_those_of_the_encoder_and_are_made_once(pooled: bool) -> None:
    encode = Encoder(pooled=pooled, dtype=torch.bfloat16)
    texts = cache_texts(["a cat", "a dog", "a cat", ""], encode, encoder="clip")
    assert encode.asked == ["a cat", "a dog", ""]
    for text in ("a cat", "a dog", ""):
        expected, found = Encoder(pooled=pooled, dtype=torch.bfloat16)(text), texts[text]
        assert found.context.dtype == torch.bfloat16
        assert torch.equal(found.context, expected.context)
        if expected.pooled is None:
            assert found.pooled is None
        else:
            assert found.pooled is not None
            assert torch.equal(found.pooled, expected.pooled)
    again = Encoder()
    cache_texts(["", "a dog", "a cat"], again, encoder="clip")
    assert again.asked == []


def test_only_what_changed_is_made_again() -> None:
    cache_texts(["a cat", "a dog"], Encoder(), encoder="clip")
    encode = Encoder()
    cache_texts(["a cat ", "a dog"], encode, encoder="clip")
    assert encode.asked == ["a cat "]
    cache_texts(["a dog"], encode, encoder="clip, 2 windows")
    assert encode.asked == ["a cat ", "a dog"]


def test_missing_texts_are_told_without_making_them() -> None:
    cache_texts(["a cat"], Encoder(), encoder="clip")
    assert missing_texts(["a dog", "a cat", "b", "a dog"], "clip") == ["a dog", "b"]
    assert missing_texts(["a cat"], "another") == ["a cat"]
    assert missing_texts(["a cat"], "clip") == []


def test_it_reads_an_entry_once_and_forgets_the_oldest(
    isolated_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts_module, "KEPT", 2)
    texts = cache_texts(["a", "b", "c"], Encoder(), encoder="clip")
    assert texts["a"] is texts["a"]
    assert texts["b"] is not texts["c"]
    for path in entries(isolated_cache):
        path.unlink()
    assert texts["b"].context is not None
    with pytest.raises(DataError):
        texts["a"]


def test_it_is_pickled_without_the_states_it_remembers() -> None:
    texts = cache_texts(["a cat", "a dog"], Encoder(), encoder="clip")
    fresh = len(pickle.dumps(texts))
    expected = texts["a cat"].context
    assert len(pickle.dumps(texts)) == fresh < 200
    copy = pickle.loads(pickle.dumps(texts))
    assert torch.equal(copy["a cat"].context, expected)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("part", [0, 1])
def test_states_that_are_not_finite_are_named_and_never_kept(
    isolated_cache: Path, value: float, part: int
) -> None:
    text = "a \x1b[2J dragon " + "x" * 300

    def encode(text: str) -> TextStates:
        states = [torch.ones(4, 2), torch.ones(2)]
        if "dragon" in text:
            states[part][-1] = value
        return TextStates(*states)

    with pytest.raises(NonFiniteError, match=r"a \\x1b\[2J dragon x+…") as caught:
        cache_texts(["a cat", text], encode, encoder="clip")
    assert len(str(caught.value)) < 200
    assert len(entries(isolated_cache)) == 1


def test_a_damaged_entry_is_made_again_and_named_when_it_is_in_use(isolated_cache: Path) -> None:
    texts = cache_texts(["a cat"], Encoder(), encoder="clip")
    (entry,) = entries(isolated_cache)
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match=r"'a cat'.*\.text") as caught:
        texts["a cat"]
    assert caught.value.hint
    encode = Encoder()
    again = cache_texts(["a cat"], encode, encoder="clip")
    assert encode.asked == ["a cat"]
    assert entry.read_bytes() == whole
    assert torch.equal(again["a cat"].context, Encoder()("a cat").context)


def test_a_text_that_was_never_cached_is_named() -> None:
    with pytest.raises(DataError, match="'a bird'"):
        Texts("clip")["a bird"]


def test_an_entry_never_depends_on_what_else_was_missing(isolated_cache: Path) -> None:
    cache_texts(["a cat", "a dog", "b"], Encoder(), encoder="clip")
    together = {path: path.read_bytes() for path in entries(isolated_cache)}
    for path in together:
        path.unlink()
    for text in ("b", "a dog", "a cat"):
        cache_texts([text], Encoder(), encoder="clip")
    assert {path: path.read_bytes() for path in entries(isolated_cache)} == together


def test_progress_counts_distinct_texts_found_or_made() -> None:
    seen: list[tuple[int, int]] = []
    cache_texts(["a"], Encoder(), encoder="clip")
    cache_texts(["a", "b", "a"], Encoder(), encoder="clip", progress=lambda *n: seen.append(n))
    assert seen == [(1, 2), (2, 2)]

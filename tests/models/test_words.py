"""How prompts are read, without the encoders that read them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eri.errors import ModelError
from eri.models import load_text
from eri.models.windows import Joined
from eri.models.words import States, Words, load_words
from tests.families import single_file
from tests.models.conftest import FILLED_WITH

CAT = "a photo of a cat"


@pytest.fixture
def copy(sdxl: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sdxl, tmp_path / "copy")


def test_ids_of_clips_own_vocabulary(file: Path, family: str) -> None:
    readers = load_words(file).readers
    for reader, pad in zip(readers, FILLED_WITH[family], strict=True):
        assert reader.tokens([CAT, ""]) == [[320, 1125, 539, 320, 2368], []]
        assert (reader.marks.start, reader.marks.end, reader.marks.pad) == (49406, 49407, pad)


def test_tokens_are_without_start_and_end(sd15: Path) -> None:
    (reader,) = load_words(sd15).readers
    assert reader.length == 77
    assert reader.tokens(["", "a red b"]) == [[], [26, 17, 4, 29, 27]]
    assert len(reader.tokens(["a " * 500])[0]) == 500
    assert reader.tokens([]) == []


def test_prompts_are_read_with_their_weights(sd15: Path) -> None:
    (reader,) = load_words(sd15).readers
    prompts = ["a (red:1.5) b", "a red b", ""]
    first, second, third = reader.read(prompts, True)
    assert first.tokens == second.tokens == [26, 17, 4, 29, 27]
    assert first.weights == [1.0, 1.5, 1.5, 1.5, 1.0]
    assert second.weights == [1.0] * 5
    assert (first.shares, second.shares) == ([5], [5])
    assert (third.tokens, third.weights, third.shares) == ([], [], [0])
    literal, also = reader.read(prompts[:2], [False, True])
    assert len(literal.tokens) > 5
    assert set(literal.weights) == {1.0}
    assert also == second
    assert reader.read([], True) == []


@pytest.mark.parametrize(("joined", "shares"), [("ui", [74, 3]), ("kohya", [75, 2])])
def test_the_shares_of_windows_are_those_of_the_way_to_join(
    sd15: Path, joined: Joined, shares: list[int]
) -> None:
    words = load_words(sd15, joined=joined)
    assert words.joined == joined
    (reader,) = words.readers
    (prompt,) = reader.read(["a " * 74 + "(red:1.5)"], True)
    assert prompt.shares == shares
    first, second = reader.cut(prompt, 2)
    assert len(first) == len(second) == words.tokens == 77
    assert first[0] == second[0] == reader.marks.start


def count_of(words: Words, tokens: int) -> tuple[int, int, int, int]:
    prompt = "cat " * tokens
    lost = (words.tokens_lost(prompt, n) for n in (1, 2, 3))
    return (words.windows_needed([CAT, prompt]), *lost)


def test_windows_needed_and_tokens_lost(sdxl: Path) -> None:
    words = load_words(sdxl)
    assert count_of(words, 0) == (1, 0, 0, 0)
    assert count_of(words, 75) == (1, 0, 0, 0)
    assert count_of(words, 76) == (2, 1, 0, 0)
    assert count_of(words, 150) == (2, 75, 0, 0)
    assert count_of(words, 151) == (3, 76, 1, 0)
    assert count_of(words, 230) == (3, 155, 80, 5)
    assert words.windows_needed([]) == 1
    assert words.tokens_lost("cat " * 80) == 5


def test_words_are_those_of_the_whole_encoder_and_no_tensor_is_read(
    folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = load_text(folder).words

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("eri.formats.tensors.safe_open", refused)
    with pytest.raises(AssertionError, match="a tensor was read"):  # by no other way
        load_text(folder)
    prompts = [CAT, "a watercolour of seven foxes, in the snow " * 12, "(a:1.2) " * 40]
    for path in (folder, file):
        words = load_words(path)
        assert (words.tokens, words.states) == (full.tokens, full.states)
        for reader, own in zip(words.readers, full.readers, strict=True):
            for weighted in (False, True):
                assert reader.read(prompts, weighted) == own.read(prompts, weighted)


def test_states_of_the_families(sd15_real: Path, sd21: Path, sdxl: Path) -> None:
    assert load_words(sd15_real, clip_skip=2).states == States(2, normed=True)
    assert load_words(sd21).states == States(1, normed=True)
    assert load_words(sdxl).states == States(2, normed=False)


# ------------------------------------------------------------------------- refusals


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Put tensors into an encoder's file in the place of its own, or leave them out."""
    path = folder / "model.safetensors"
    changed = load_file(path) | tensors
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)


def test_a_model_without_a_text_encoder_is_refused(sd15_real: Path, tmp_path: Path) -> None:
    path = single_file(sd15_real, tmp_path / "unet.safetensors", without=["text", "vae"])
    with pytest.raises(ModelError, match="no text encoder") as caught:
        load_words(path)
    assert "model.text" in str(caught.value.hint)


def test_sdxl_without_its_projection_is_refused(copy: Path) -> None:
    change(copy / "text_encoder_2", **{"text_projection.weight": None})
    with pytest.raises(ModelError, match="no text_projection"):
        load_words(copy)


@pytest.mark.parametrize(
    ("encoder", "name", "tensor", "problem"),
    [
        ("text_encoder", "text_model.final_layer_norm.bias", None, "missing: final_layer_norm"),
        ("text_encoder_2", "text_projection.weight", torch.zeros(3, 64), "wrong shape: text_proj"),
        (
            "text_encoder_2",
            "text_model.encoder.layers.7.mlp.fc1.bias",
            torch.zeros(256),
            "not in this model: text_model.encoder.layers.7",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(
    copy: Path, encoder: str, name: str, tensor: Tensor | None, problem: str
) -> None:
    change(copy / encoder, **{name: tensor})
    with pytest.raises(ModelError, match="1 tensors do not fit") as caught:
        load_words(copy)
    assert caught.value.problems[0].startswith(problem)


def test_a_projection_that_nothing_uses_is_left_alone(copy: Path) -> None:
    change(copy / "text_encoder", **{"text_projection.weight": torch.zeros(3, 5)})
    assert load_words(copy).windows_needed([CAT]) == 1


def test_encoders_of_different_length_are_refused(copy: Path) -> None:
    config = copy / "text_encoder_2" / "config.json"
    changed = json.loads(config.read_text()) | {"max_position_embeddings": 60}
    config.write_text(json.dumps(changed))
    with pytest.raises(ModelError, match="read 77 and 60 tokens"):
        load_words(copy)


def test_a_tokenizer_of_another_model_is_refused(sd15: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(sd15, tmp_path / "copy")
    path = copy / "tokenizer" / "vocab.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"more": 59}))
    with pytest.raises(ModelError, match="has 60 tokens, the text encoder knows 59"):
        load_words(copy)
    path.write_text("[")
    with pytest.raises(ModelError, match="tokenizer cannot be read"):
        load_words(copy)

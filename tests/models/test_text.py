"""Prompts to conditioning, compared with diffusers' pipelines and transformers' models."""

import json
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eri.errors import ConfigError, ModelError
from eri.models import load_text
from eri.models.windows import Joined
from tests.families import single_file
from tests.models.conftest import FILLED_WITH
from tests.tiny import WORDS

CAT = "a photo of a cat"
LONG = " ".join(["a watercolour of seven foxes, in the snow"] * 12)  # 108 tokens
EDGES = "cat " * 74 + "! ! cat"  # of OpenCLIP's windows: where `!` fills up, kohya changes these
PROMPTS = [CAT, "", "Ünïcödé 日本の城 🏯 it's", LONG, "   Two\n\nLINES  "]


def encoders(folder: Path) -> list[tuple[Any, Any]]:
    """Transformers' own models and tokenizers of a folder."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    found = [
        (
            CLIPTextModel.from_pretrained(folder / "text_encoder"),
            CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        )
    ]
    if (folder / "text_encoder_2").exists():
        second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
        found.append((second, CLIPTokenizer.from_pretrained(folder / "tokenizer_2")))
    return found


def encode_as_diffusers(folder: Path, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    parts: dict[str, Any] = {"vae": None, "unet": None, "scheduler": None}
    for number, (model, tokenizer) in zip(("", "_2"), encoders(folder), strict=False):
        parts |= {f"text_encoder{number}": model, f"tokenizer{number}": tokenizer}
    with torch.no_grad():
        if "text_encoder_2" in parts:
            pipeline = StableDiffusionXLPipeline(**parts, add_watermarker=False)
            context, _, pooled, _ = pipeline.encode_prompt(
                prompts, device="cpu", do_classifier_free_guidance=False
            )
            return context, pooled
        parts |= {"safety_checker": None, "feature_extractor": None}
        pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        return pipeline.encode_prompt(prompts, "cpu", 1, False)[0], None


def difference(found: Tensor | None, expected: Tensor | None) -> float:
    """Relative, in the largest number."""
    if found is None or expected is None:
        assert found is expected
        return 0.0
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


# ------------------------------------------------------------------ what diffusers gives


@pytest.mark.parametrize("layout", ["folder", "file"])
def test_states_are_those_of_diffusers(layout: str, folder: Path, file: Path) -> None:
    expected, pool = encode_as_diffusers(folder, PROMPTS)
    context, pooled = load_text(folder if layout == "folder" else file).encode(PROMPTS)
    assert difference(context, expected) < 1e-5
    assert difference(pooled, pool) < 1e-5
    assert context.dtype == torch.float32
    for index in range(1, len(PROMPTS)):  # the prompts are told apart
        assert difference(context[index], context[0]) > 1e-2


def test_other_ways_to_store_an_encoder(sdxl: Path, sd21: Path, sd15_real: Path, tmp_path: Path):
    for index, (folder, options) in enumerate(
        [
            (sdxl, {"projection": "weight"}),
            (sd21, {"text": "sgm"}),
            (sd15_real, {"text": "without_text_model"}),
            (sd15_real, {"loose": True, "position_ids": torch.float32}),
        ]
    ):
        path = single_file(folder, tmp_path / f"{index}.safetensors", **options)
        context, pooled = load_text(path).encode([CAT])
        expected, pool = load_text(folder).encode([CAT])
        assert difference(context, expected) < 1e-5
        assert difference(pooled, pool) < 1e-5


def test_a_projection_that_is_not_transposed_is_noticed(sdxl: Path, tmp_path: Path) -> None:
    weight = load_file(sdxl / "text_encoder_2/model.safetensors")["text_projection.weight"]
    name = "conditioner.embedders.1.model.text_projection"
    expected = encode_as_diffusers(sdxl, [CAT])[1]
    for stored, as_expected in [(weight.T, True), (weight, False)]:
        path = tmp_path / f"{as_expected}.safetensors"
        pooled = load_text(single_file(sdxl, path, extra={name: stored})).encode([CAT])[1]
        assert (difference(pooled, expected) < 1e-5) == as_expected


def test_a_folder_with_its_own_small_vocabulary(sd15: Path) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    prompts = [" ".join(WORDS), "", "a red apple"]
    model = CLIPTextModel.from_pretrained(sd15 / "text_encoder")
    ids = CLIPTokenizer.from_pretrained(sd15 / "tokenizer")(
        prompts, padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        expected = model(ids).last_hidden_state
    context, pooled = load_text(sd15).encode(prompts)
    assert context.shape == (3, 77, 32)
    assert pooled is None
    torch.testing.assert_close(context, expected)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_files_with_and_without_the_inner_name_are_read(
    sd15: Path, tmp_path: Path, prefix: str
) -> None:
    folder = shutil.copytree(sd15, tmp_path / "model")
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    plain = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    written = {prefix + name: tensor for name, tensor in plain.items()}
    written[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    save_file(written, path)
    torch.testing.assert_close(load_text(folder).encode(["red"]), load_text(sd15).encode(["red"]))


def test_many_prompts_are_the_same_as_few(sd15: Path) -> None:
    text = load_text(sd15)
    prompts = [letter * (index + 1) for index, letter in enumerate("abcdefghijklmnopqrst")]
    together = text.encode(prompts)[0]
    assert len(together) == 20
    alone = torch.cat([text.encode([prompt])[0] for prompt in prompts])
    torch.testing.assert_close(together, alone)


def test_weights_are_frozen_whole_and_of_the_asked_type(folder: Path) -> None:
    text = load_text(folder, dtype=torch.bfloat16)
    assert not text.model.training
    for tensor in chain(text.model.parameters(), text.model.buffers()):
        assert not tensor.is_meta
        assert not tensor.requires_grad
    assert {parameter.dtype for parameter in text.model.parameters()} == {torch.bfloat16}
    context, pooled = text.encode([CAT])
    assert context.dtype == torch.bfloat16
    expected, pool = load_text(folder).encode([CAT])
    assert difference(context.float(), expected) < 0.05
    assert difference(pooled if pooled is None else pooled.float(), pool) < 0.05


# ------------------------------------------------------------------------- clip skip


@pytest.mark.parametrize(("skip", "depth"), [(None, 1), (1, 1), (2, 2)])
def test_clip_skip_of_sd15(sd15_real: Path, skip: int | None, depth: int) -> None:
    ((model, tokenizer),) = encoders(sd15_real)
    ids = tokenizer([CAT], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        expected = {n: model.final_layer_norm(states[-n]) for n in (1, 2)}
    text = load_text(sd15_real, clip_skip=skip)
    found = text.encode([CAT])[0]
    assert text.words.states.note is None
    assert difference(found, expected[depth]) < 1e-5
    assert difference(found, expected[3 - depth]) > 1e-2


@pytest.mark.parametrize("skip", [0, 3])
def test_clip_skip_beyond_the_layers_is_refused(sd15_real: Path, skip: int) -> None:
    with pytest.raises(ConfigError, match=f"clip_skip is {skip}, .* has 2 layers") as caught:
        load_text(sd15_real, clip_skip=skip)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("family", ["sd21", "sdxl"], indirect=True)
def test_sd2_and_sdxl_have_their_own_states(folder: Path) -> None:
    own = load_text(folder)
    assert own.words.states.note is None
    for skip in (1, 2):
        text = load_text(folder, clip_skip=skip)
        assert "changes nothing" in str(text.words.states.note)
        torch.testing.assert_close(text.encode([CAT]), own.encode([CAT]), rtol=0, atol=0)
    for skip in (0, 3):
        with pytest.raises(ConfigError, match="the last states but one") as caught:
            load_text(folder, clip_skip=skip)
        assert caught.value.exit_code == 2


# --------------------------------------------------------------------- long prompts


def chosen_states(model: Any, ids: Tensor, towers: int) -> Tensor:
    output = model(ids, output_hidden_states=True)
    return output.last_hidden_state if towers == 1 else output.hidden_states[-2]


def windows_as_ui(folder: Path, prompt: str, count: int) -> Tensor:
    """Each 75 tokens with their own start and end, encoded apart, one behind the other."""
    towers = encoders(folder)
    channels = []
    for model, tokenizer in towers:
        own = tokenizer(prompt, verbose=False).input_ids[1:-1]
        states = []
        for number in range(count):
            ids = [49406, *own[75 * number : 75 * number + 75], 49407]
            ids += [tokenizer.pad_token_id] * (77 - len(ids))
            states.append(chosen_states(model, torch.tensor([ids]), len(towers)))
        channels.append(torch.cat(states, dim=1))
    return torch.cat(channels, dim=2)


def windows_as_kohya(folder: Path, prompt: str, count: int) -> Tensor:
    """As kohya's scripts for `max_token_length`: tokenize as one long text and cut that."""
    towers = encoders(folder)
    channels = []
    for model, tokenizer in towers:
        length = 75 * count + 2
        ids = tokenizer(
            prompt, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids[0]
        chunks = []
        for start in range(1, length - 77 + 2, 75):
            chunk = torch.cat([ids[:1], ids[start : start + 75], ids[-1:]])
            if tokenizer.pad_token_id != tokenizer.eos_token_id:
                if chunk[-2] not in (tokenizer.eos_token_id, tokenizer.pad_token_id):
                    chunk[-1] = tokenizer.eos_token_id
                if chunk[1] == tokenizer.pad_token_id:
                    chunk[1] = tokenizer.eos_token_id
            chunks.append(chunk)
        states = chosen_states(model, torch.stack(chunks), len(towers)).reshape(1, -1, WIDTH)
        parts = [states[:, :1]]
        parts += [states[:, start : start + 75] for start in range(1, 77 * count, 77)]
        channels.append(torch.cat([*parts, states[:, -1:]], dim=1))
    return torch.cat(channels, dim=2)


WIDTH = 64
WAYS: list[tuple[Joined, Callable[[Path, str, int], Tensor], dict[int, int]]] = [
    ("ui", windows_as_ui, {1: 77, 2: 154, 3: 231}),
    ("kohya", windows_as_kohya, {1: 77, 2: 152, 3: 227}),
]


@pytest.mark.parametrize(("joined", "expect", "lengths"), WAYS, ids=["ui", "kohya"])
def test_windows(
    folder: Path,
    joined: Joined,
    expect: Callable[[Path, str, int], Tensor],
    lengths: dict[int, int],
) -> None:
    text = load_text(folder, joined=joined)
    one_window = text.encode([LONG])[1]
    for count, length in lengths.items():
        context, pooled = text.encode([CAT, EDGES, LONG], windows=count)
        assert context.shape[1] == length
        with torch.no_grad():
            expected = torch.cat([expect(folder, prompt, count) for prompt in (CAT, EDGES, LONG)])
        assert difference(context, expected) < 1e-5
        assert difference(pooled if pooled is None else pooled[2:], one_window) < 1e-5


def test_the_two_ways_differ_and_one_window_is_the_same(folder: Path) -> None:
    ui, kohya = (load_text(folder, joined=joined) for joined in ("ui", "kohya"))
    torch.testing.assert_close(ui.encode(PROMPTS), kohya.encode(PROMPTS), rtol=0, atol=0)
    assert ui.encode([LONG], 2)[0].shape != kohya.encode([LONG], 2)[0].shape


def test_what_is_cut_off_changes_nothing(sd15: Path) -> None:
    text = load_text(sd15)
    assert text.words.tokens_lost("a " * 75) == 0
    assert text.words.tokens_lost("a " * 80) == 5
    cut = text.encode(["a " * 75])[0]
    torch.testing.assert_close(text.encode(["a " * 80])[0], cut)
    assert not torch.allclose(text.encode(["a " * 74])[0], cut)


def test_a_window_is_as_long_as_the_encoders_positions(sd15: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd15, tmp_path / "model")
    weights, config = (folder / "text_encoder" / n for n in ("model.safetensors", "config.json"))
    shorten = {"max_position_embeddings": 20}
    config.write_text(json.dumps(json.loads(config.read_text()) | shorten))
    tensors = load_file(weights)
    place = next(name for name in tensors if "position_embedding" in name)
    save_file(tensors | {place: tensors[place][:20].clone()}, weights)
    text = load_text(folder)
    assert text.words.tokens == 20
    assert text.encode(["a " * 30], windows=2)[0].shape == (1, 40, 32)
    assert text.words.windows_needed(["a " * 19]) == 2
    assert text.words.tokens_lost("a " * 19) == 1


# ----------------------------------------------------------------------- tokenizers


def test_the_folders_own_tokenizer_wins(folder: Path, family: str, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    for path in copy.glob("tokenizer*/vocab.json"):
        vocabulary = json.loads(path.read_text())
        photo, cat = "photo</w>", "cat</w>"
        vocabulary[photo], vocabulary[cat] = vocabulary[cat], vocabulary[photo]
        path.write_text(json.dumps(vocabulary))
    own, changed = load_text(folder), load_text(copy)
    for reader, pad in zip(own.words.readers, FILLED_WITH[family], strict=True):
        assert reader.tokens([CAT]) == [[320, 1125, 539, 320, 2368]]
        assert reader.marks.pad == pad
    for reader in changed.words.readers:
        assert reader.tokens([CAT]) == [[320, 2368, 539, 320, 1125]]
    same = changed.encode(["a cat of a photo"])[0]
    torch.testing.assert_close(same, own.encode([CAT])[0])
    assert difference(changed.encode([CAT])[0], own.encode([CAT])[0]) > 1e-2


def test_what_fills_a_prompt_up_is_the_folders_choice(sd21: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(sd21, tmp_path / "copy")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = copy / "tokenizer" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<|endoftext|>"}))
    text = load_text(copy)
    assert text.words.readers[0].marks.pad == 49407
    found, own = text.encode([CAT])[0], load_text(sd21).encode([CAT])[0]
    assert difference(found, encode_as_diffusers(copy, [CAT])[0]) < 1e-5
    assert difference(found[:, :7], own[:, :7]) < 1e-5  # start, five tokens, end
    assert difference(found[:, 7:], own[:, 7:]) > 1e-2


# ------------------------------------------------------------------------- refusals


def test_a_model_without_a_text_encoder(sd15_real: Path, tmp_path: Path) -> None:
    path = single_file(sd15_real, tmp_path / "unet.safetensors", without=["text", "vae"])
    with pytest.raises(ModelError, match="no text encoder") as caught:
        load_text(path)
    assert "model.text" in str(caught.value.hint)
    with pytest.raises(ModelError, match="no such file"):
        load_text(tmp_path / "none")


def test_a_missing_tensor_is_refused(sd21: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(sd21, tmp_path / "copy")
    weights = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    tensors.pop("text_model.final_layer_norm.bias")
    save_file(tensors, weights)
    with pytest.raises(ModelError, match="1 tensors do not fit") as caught:
        load_text(copy)
    assert "final_layer_norm.bias" in caught.value.problems[0]


def test_what_cannot_be_encoded(sd15: Path) -> None:
    text = load_text(sd15)
    for prompts, windows in (([], 1), (["a"], 0), ("a red", 1)):
        with pytest.raises(ValueError, match="a list of prompts and at least one window"):
            text.encode(prompts, windows)

"""Text encoders in files and folders: every tensor named once, sizes out of the shapes."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from eri.errors import ModelError
from eri.formats.header import TensorInfo
from eri.formats.parts import TextPart
from eri.formats.text_names import folder_parts, hf_part, openclip_part, text_shapes
from tests.compvis_names import open_clip
from tests.tiny import on_meta

FILE = Path("model.safetensors")
TOKENS = "embeddings.token_embedding.weight"
Named = dict[str, tuple[str, TensorInfo]]


def named(tensors: Mapping[str, Tensor]) -> Named:
    """What a single file's reader hands over."""
    return {
        name: (f"prefix.{name}", TensorInfo("F16", tuple(tensor.shape), 0, 0))
        for name, tensor in tensors.items()
    }


def encoder(*, projected: bool = False, layers: int = 2, **config: object) -> dict[str, Tensor]:
    """The tensors of a text encoder without memory, by the names of older transformers."""
    settings = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1}
    build = CLIPTextModelWithProjection if projected else CLIPTextModel
    model = on_meta(build, CLIPTextConfig(**settings | {"num_hidden_layers": layers} | config))
    return {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": t
        for name, t in model.state_dict().items()
    }


def shapes(part: TextPart) -> dict[str, tuple[int, ...]]:
    return {name: piece.shape for name, piece in part.pieces.items()}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {
        name.removeprefix("text_model."): tuple(tensor.shape) for name, tensor in tensors.items()
    }


CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20}
SAME = {"vocab_size": 49408, "max_position_embeddings": 77, "layer_norm_eps": 1e-5}


def test_clip_l_of_a_single_file() -> None:
    expected = encoder(layers=12, **CLIP_L)
    part = hf_part(FILE, named(expected))
    assert shapes(part) == shapes_of(expected)
    own = {"num_hidden_layers": 12, "projection_dim": 768, "hidden_act": "quick_gelu"}
    assert part.config == CLIP_L | SAME | own
    assert (part.tokenizer, part.pad) == (None, 49407)
    assert part.pieces[TOKENS].key == f"prefix.text_model.{TOKENS}"
    assert part.pieces[TOKENS].file == FILE


def test_openclip_h_loses_its_last_layer_and_its_projection() -> None:
    stored = encoder(projected=True, layers=24, projection_dim=1024, **CLIP_H)
    part = openclip_part(FILE, named(open_clip(stored)), penultimate=True)
    assert shapes(part) == shapes_of(encoder(layers=23, **CLIP_H))
    own = {"num_hidden_layers": 23, "projection_dim": 1024, "hidden_act": "gelu"}
    assert part.config == CLIP_H | SAME | own
    assert (part.tokenizer, part.pad) == (None, 0)


def test_openclip_h_without_its_last_layer_keeps_the_others() -> None:
    stored = encoder(layers=23, **CLIP_H)
    part = openclip_part(FILE, named(open_clip(stored)), penultimate=True)
    assert part.config["num_hidden_layers"] == 23


def test_openclip_big_g_keeps_everything() -> None:
    stored = encoder(projected=True, layers=32, projection_dim=1280, **BIG_G)
    part = openclip_part(FILE, named(open_clip(stored)), penultimate=False)
    assert shapes(part) == shapes_of(stored)
    assert len(part.pieces) == 517
    own = {"num_hidden_layers": 32, "projection_dim": 1280, "hidden_act": "gelu"}
    assert part.config == BIG_G | SAME | own


@pytest.mark.parametrize("projected", [True, False])
def test_shapes_are_those_of_transformers(projected: bool) -> None:
    config = CLIP_L | SAME | {"projection_dim": 512, "vocab_size": 59, "num_hidden_layers": 11}
    sizes = {name: value for name, value in config.items() if name != "num_hidden_layers"}
    expected = encoder(projected=projected, layers=11, **sizes)
    assert text_shapes(config, projected=projected) == shapes_of(expected)


def test_rows_and_the_transposed_projection() -> None:
    stored = open_clip(encoder(projected=True, projection_dim=128))
    pieces = openclip_part(FILE, named(stored), penultimate=False).pieces
    layer = "encoder.layers.1.self_attn"
    for index, name in enumerate(["q_proj", "k_proj", "v_proj"]):
        for kind in ("weight", "bias"):
            piece = pieces[f"{layer}.{name}.{kind}"]
            assert piece.key == f"prefix.transformer.resblocks.1.attn.in_proj_{kind}"
            assert piece.rows == (64 * index, 64 * index + 64)
            assert not piece.transposed
    assert tuple(stored["text_projection"].shape) == (64, 128)
    projection = pieces["text_projection.weight"]
    assert (projection.shape, projection.transposed) == ((128, 64), True)


def test_a_projection_with_transformers_name_is_not_transposed() -> None:
    stored = open_clip(encoder(projected=True, projection_dim=128), "weight")
    part = openclip_part(FILE, named(stored), penultimate=False)
    projection = part.pieces["text_projection.weight"]
    assert (projection.shape, projection.transposed) == ((128, 64), False)
    assert part.config["projection_dim"] == 128


@pytest.mark.parametrize("start", ["", "text_model."])
def test_the_inner_name_may_be_missing_and_buffers_are_left_out(start: str) -> None:
    stored = {start + n.removeprefix("text_model."): t for n, t in encoder().items()}
    extra = {f"{start}embeddings.position_ids": torch.empty(1, 77), "logit_scale": torch.empty(())}
    assert shapes(hf_part(FILE, named(stored | extra))) == shapes_of(encoder())


@pytest.mark.parametrize(
    ("width", "activation", "pad"),
    [(64, "quick_gelu", 49407), (768, "quick_gelu", 49407), (1024, "gelu", 0), (1280, "gelu", 0)],
)
def test_the_width_tells_whose_encoder_it_is(width: int, activation: str, pad: int) -> None:
    part = hf_part(FILE, named(encoder(hidden_size=width)))
    assert (part.config["hidden_act"], part.pad) == (activation, pad)


STRANGE = "encoder.layers.0.mlp.gate.weight"


def test_a_name_of_no_text_encoder_is_refused() -> None:
    for stored, read in [
        (encoder(), hf_part),
        (open_clip(encoder()), lambda *a: openclip_part(*a, penultimate=False)),
    ]:
        read(FILE, named(stored))
        with pytest.raises(ModelError, match="1 tensors belong to no CLIP") as caught:
            read(FILE, named(stored | {STRANGE: torch.empty(1)}))
        assert caught.value.problems == (f"prefix.{STRANGE}",)
        assert caught.value.where == str(FILE)


def test_many_strange_names_are_counted_and_made_printable() -> None:
    strange = {f"\x1b{index}": torch.empty(1) for index in range(7)}
    with pytest.raises(ModelError, match="7 tensors") as caught:
        hf_part(FILE, named(encoder() | strange))
    assert caught.value.problems[0] == r"prefix.\x1b0"
    assert caught.value.problems[-1] == "and 2 more"


def test_the_same_tensor_by_two_names_is_refused() -> None:
    twice = encoder() | {TOKENS: torch.empty(49408, 64)}
    with pytest.raises(ModelError, match="are the same tensor"):
        hf_part(FILE, named(twice))
    both = open_clip(encoder(projected=True)) | {"text_projection.weight": torch.empty(512, 64)}
    with pytest.raises(ModelError, match="are the same tensor"):
        openclip_part(FILE, named(both), penultimate=False)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (TOKENS, (49408, 100), "100 wide"),
        (TOKENS, (49407, 64), "knows 49407 tokens"),
        (TOKENS, (49408,), r"is \[49408\]"),
        (TOKENS, None, "token_embedding.weight is missing"),
        ("embeddings.position_embedding.weight", (0, 64), r"is \[0, 64\]"),
        ("encoder.layers.0.mlp.fc1.weight", None, "fc1.weight is missing"),
    ],
)
def test_shapes_that_make_no_encoder_are_refused(
    name: str, shape: tuple[int, ...] | None, message: str
) -> None:
    stored = named(encoder())
    del stored[f"text_model.{name}"]
    if shape is not None:
        stored[name] = (name, TensorInfo("F16", shape, 0, 0))
    with pytest.raises(ModelError, match=message) as caught:
        hf_part(FILE, stored)
    assert caught.value.where == str(FILE)


@pytest.mark.parametrize("shape", [(191, 64), ()])
def test_rows_that_are_no_three_matrices_are_refused(shape: tuple[int, ...]) -> None:
    stored = named(open_clip(encoder()))
    stored["transformer.resblocks.0.attn.in_proj_weight"] = ("x", TensorInfo("F16", shape, 0, 0))
    with pytest.raises(ModelError, match="rows are those of three matrices"):
        openclip_part(FILE, stored, penultimate=False)


def test_a_last_layer_alone_leaves_nothing() -> None:
    with pytest.raises(ModelError, match="not whole"):
        openclip_part(FILE, named(open_clip(encoder(layers=1))), penultimate=True)


def test_folders_of_each_family(sd15_real: Path, sd21: Path, sdxl: Path) -> None:
    one, (two,), (first, second) = map(folder_parts, (sd15_real, sd21, sdxl))
    assert len(one) == 1
    assert (one[0].tokenizer, two.tokenizer) == (sd15_real / "tokenizer", sd21 / "tokenizer")
    assert (first.tokenizer, second.tokenizer) == (sdxl / "tokenizer", sdxl / "tokenizer_2")
    assert (one[0].pad, two.pad, first.pad, second.pad) == (49407, 0, 49407, 0)
    assert [p.config["hidden_act"] for p in (first, second)] == ["quick_gelu", "gelu"]
    assert "text_projection.weight" in second.pieces
    assert "text_projection.weight" not in first.pieces


@pytest.fixture
def folder(sd15_real: Path, tmp_path: Path) -> Path:
    """A copy of a model's text encoder and tokenizer."""
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(sd15_real / name, tmp_path / name)
    return tmp_path


def test_weights_in_shards(folder: Path) -> None:
    (whole,) = folder_parts(folder)
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    shards = {name: f"m-{index % 2}.safetensors" for index, name in enumerate(tensors)}
    for shard in set(shards.values()):
        held = {name: tensors[name] for name in tensors if shards[name] == shard}
        save_file(held, weights.parent / shard)
    weights.unlink()
    index = weights.with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": shards}))
    (part,) = folder_parts(folder)
    assert shapes(part) == shapes(whole)
    assert {piece.file.name for piece in part.pieces.values()} == {*shards.values()}


def test_the_folder_of_a_text_encoder_alone(folder: Path) -> None:
    (part,) = folder_parts(folder / "text_encoder")
    assert (part.tokenizer, part.pad) == (None, 49407)
    for file in (folder / "tokenizer").iterdir():
        shutil.copy(file, folder / "text_encoder")
    (part,) = folder_parts(folder / "text_encoder")
    assert part.tokenizer == folder / "text_encoder"


def test_an_encoder_alone_of_another_vocabulary_needs_its_tokenizer(sd15: Path) -> None:
    with pytest.raises(ModelError, match="knows 59 tokens, CLIP has 49408"):
        folder_parts(sd15 / "text_encoder")


def test_folders_without_a_text_encoder(folder: Path, sd15: Path, tmp_path: Path) -> None:
    assert folder_parts(sd15 / "unet") == ()
    shutil.rmtree(folder / "text_encoder")
    assert folder_parts(folder) == ()
    with pytest.raises(ModelError, match="no such file or folder"):
        folder_parts(tmp_path / "none")


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_half_a_tokenizer_is_refused(folder: Path, missing: str) -> None:
    (folder / "tokenizer" / missing).unlink()
    with pytest.raises(ModelError, match="nor both vocab"):
        folder_parts(folder)
    (folder / "tokenizer" / "tokenizer.json").touch()
    assert folder_parts(folder)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ModelError, match="no folder tokenizer"):
        folder_parts(folder)

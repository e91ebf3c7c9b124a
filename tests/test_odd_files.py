"""What `eri train` and `eri inspect` say of every odd file: one row for each."""

import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from eri.errors import ModelError
from eri.models import load_unet
from eri.run.base import look_at
from eri.run.inspect import as_json, as_text, inspect_path
from tests import odd_files as odd
from tests.families import mixed
from tests.odd_files import (
    SSD_1B,
    UNET,
    Builder,
    adapter,
    built,
    content,
    damaged,
    names,
    one,
    text_file,
    whole,
)

Said = TypeVar("Said")
SECONDS = 2  # of a slow processor, for a verdict; half of one is the rule
NAN = {f"{UNET}out.0.bias": torch.full((32,), torch.nan)}
UNKNOWN = {"embedding_manager.x": torch.ones(2), "lora_te_x.lora_down.weight": torch.ones(2, 2)}
ALONE = ["vae", "text"]
NOT_TRAINED = "not a model that eri trains"


@dataclass(frozen=True)
class Row:
    """One file.

    Attributes:
        name: what it is.
        build: how it is made.
        train: what `eri train` says of it; "" where it takes it.
        inspect: what `eri inspect` says of it: the kind that it tells, or, after a !, its refusal.
        late: `train` finds out when it reads the weights, and no sooner.
    """

    name: str
    build: Builder
    train: str
    inspect: str
    late: bool = False


def fine(name: str, build: Builder) -> Row:
    """A whole model."""
    return Row(name, build, "", "base model")


def refused(name: str, build: Builder, why: str) -> Row:
    """Neither a model nor anything else that eri knows; both say so."""
    return Row(name, build, why, f"!{why}")


def foreign(what: str, *tensors: str, name: str = "") -> Row:
    """Another kind of net, of which some names are enough."""
    return refused(name or what, names(*tensors), f"this is {what}.*, not a")


def addition(name: str, what: str, build: Builder) -> Row:
    """Something that goes with a base model, and is known by `inspect`."""
    return Row(name, build, f"this is {what}, {NOT_TRAINED}", "adapter")


def vae(name: str) -> Row:
    build = one("sd15_real", "vae.safetensors", without=["unet", "text"], vae=name)
    return Row(f"VAE alone, {name} names", build, f"this is a VAE, {NOT_TRAINED}", "VAE")


def unet(name: str) -> Row:
    build = one("sd15_real", without=ALONE, unet=name)
    return Row(f"U-Net alone, {name} names", build, "has no VAE", "U-Net")


def text(name: str, family: str, rename: Callable[[str], str]) -> Row:
    why = f"this is a text encoder, {NOT_TRAINED}"
    return Row(name, text_file(family, rename), why, "text encoder")


def channels(name: str, count: int, purpose: str) -> Row:
    extra = {f"{UNET}input_blocks.0.0.weight": torch.randn(32, count, 3, 3)}
    return Row(name, one("sd15_real", extra=extra), f"takes {count}.*{purpose}", "base model")


TABLE = [
    # folders of diffusers
    fine("sd15 folder", whole("sd15_real")),
    fine("sd21 folder", whole("sd21")),
    fine("sdxl folder", whole("sdxl")),
    fine("fp16 variant", whole("sd15_real", odd.as_fp16_variant)),
    fine("shards", whole("sd15_real", odd.as_shards)),
    fine("old VAE names in a folder", whole("sd15_real", odd.with_old_vae_names)),
    fine("folder without text_model.", whole("sd15_real", odd.without_text_model)),
    refused("pickles only", whole("sd15_real", odd.with_pickles_only), "weights are a pickle"),
    refused("no scheduler", whole("sd15_real", odd.without("scheduler")), "scheduler"),
    Row("no VAE folder", whole("sd15_real", odd.without("vae")), "has no VAE", "base model"),
    Row(
        "a part's folder",
        lambda models, _: models("sd15_real") / "unet",
        r"no model_index\.json",
        "U-Net",
    ),
    # whole models in one file
    fine("sd15", one("sd15_real")),
    fine("sd21", one("sd21")),
    fine("sdxl", one("sdxl")),
    fine("schedule and EMA", one("sd15_real", loose=True, ema=True)),
    fine("fp8 e4m3", one("sd15_real", dtype=torch.float8_e4m3fn)),
    fine("fp8 e5m2", one("sdxl", dtype=torch.float8_e5m2)),
    fine("mixed types", one("sd15_real", dtype=mixed)),
    fine("position_ids in float32", one("sd15_real", loose=True, position_ids=torch.float32)),
    fine("text_projection.weight", one("sdxl", projection="weight")),
    fine("sd15 without text_model.", one("sd15_real", text="without_text_model")),
    fine("sdxl without text_model.", one("sdxl", text="without_text_model")),
    fine("sd21 in sgm's layout", one("sd21", text="sgm")),
    fine("sd21 with convolutions", one("sd21", conv_projections=True)),
    fine("v_pred", one("sdxl", markers=["v_pred"])),
    fine("v_pred and ztsnr", one("sdxl", markers=["v_pred", "ztsnr"])),
    fine("odd name", one("sd15_real", "[红] a (b) ü.safetensors", metadata={"\x1b[31m": "\u202e"})),
    fine("SSD-1B", built(SSD_1B)),
    fine("unknown tensors besides", one("sd15_real", extra=UNKNOWN)),
    Row("no VAE", one("sd15_real", without=["vae"]), "has no VAE", "base model"),
    Row("no text encoder", one("sdxl", without=["text"]), "2 text encoders.*none", "base model"),
    channels("inpainting", 9, "inpainting"),
    channels("pix2pix", 8, "editing by instruction"),
    refused("EDM", one("sdxl", markers=["edm_mean", "edm_std"]), "the noise of EDM.*edm_mean"),
    # parts
    unet("compvis"),
    unet("bare"),
    unet("diffusers"),
    *map(vae, ["compvis", "bare", "vae.", "diffusers", "old_diffusers"]),
    text("text encoder alone", "sd15_real", lambda name: name),
    text("text encoder, prefixed", "sdxl", lambda name: f"cond_stage_model.transformer.{name}"),
    text("text encoder, new names", "sd21", lambda name: name.removeprefix("text_model.")),
    # adapters and embeddings
    addition("LoRA of kohya", "a LoRA", adapter("kohya")),
    addition("LoRA of diffusers", "a LoRA", adapter("diffusers")),
    Row("LoRA of PEFT", adapter("peft"), r"no model_index\.json", "adapter"),
    Row(
        "LoKr",
        names("lora_unet_mid_block_attentions_0_proj_in.lokr_w1"),
        f"this is a LoKr adapter, {NOT_TRAINED}",
        "!adapter.*belong to no module",
    ),
    foreign("an embedding", "emb_params"),
    # U-Nets that are not trained
    refused("refiner", built(odd.REFINER, without=ALONE), "this is the SDXL refiner"),
    refused(
        "unCLIP",
        one("sd21", extra={f"{UNET}label_emb.0.{n}.weight": torch.ones(256, 2048) for n in (0, 2)}),
        "this is an SD2 unCLIP model",
    ),
    foreign("the SD2 upscaler", f"{UNET}label_emb.weight", f"{UNET}input_blocks.0.0.weight"),
    foreign("a video model", f"{UNET}input_blocks.1.1.time_stack.0.attn1.to_q.weight"),
    foreign("a U-Net without CLIP", "encoder_hid_proj.weight", "conv_in.weight", name="Kolors"),
    # other kinds of models
    foreign("Stable Diffusion 3", f"{UNET}joint_blocks.0.x_block.attn.qkv.weight"),
    foreign("Flux", "double_blocks.0.img_attn.qkv.weight", "time_in.in_layer.weight"),
    foreign(
        "Flux",
        "transformer_blocks.0.norm1_context.linear.weight",
        "single_transformer_blocks.0.proj_mlp.weight",
        name="Flux in diffusers' names",
    ),
    foreign("a diffusion transformer", "adaln_single.linear.weight", name="PixArt"),
    foreign("a transformer", "blocks.0.adaLN_modulation.1.weight", name="DiT"),
    foreign("Wan", "blocks.0.self_attn.q.weight", "head.modulation", "time_embedding.0.weight"),
    foreign("a ControlNet", "control_model.zero_convs.0.0.weight"),
    foreign("a ControlNet", "conv_in.weight", "controlnet_down_blocks.0.weight", name="ControlNet"),
    foreign("a T2I-Adapter", "adapter.conv_in.weight", "adapter.body.0.resnets.0.block1.weight"),
    foreign("an IP-Adapter", "image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"),
    foreign("an AnimateDiff", "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"),
    foreign("an image upscaler", "conv_first.weight", "body.0.rdb1.conv1.weight"),
    foreign("a T5 text encoder", "encoder.block.0.layer.0.SelfAttention.q.weight"),
    foreign("a tiny autoencoder", "encoder.layers.0.weight", "decoder.layers.1.weight"),
    foreign("a quantised model", f"{UNET}out.2.weight", f"{UNET}out.2.weight.absmax"),
    refused("other tensors", names("\x1b[1m", "b"), r"this is not a .*none of its 2 tensors"),
    # no model at all
    refused("web page", content(b"<!DOCTYPE html><html>"), "this is a web page"),
    refused("git-lfs pointer", content(b"version https://git-lfs.github.com/spec/v1\noid"), "lfs"),
    refused("JSON error", content(b'{"error": "not found"}'), "this is a JSON text"),
    refused("empty file", content(b""), "the file is empty"),
    refused("torch archive", content(odd.torch_archive(), "model.ckpt"), "a zip archive"),
    refused("old pickle", content(odd.old_pickle(), "model.ckpt"), "this is a pickle"),
    refused("GGUF", content(b"GGUF" + bytes(60), "model.gguf"), "this is a GGUF file"),
    Row("a folder", lambda _, folder: folder, r"no model_index\.json", "!nothing that eri knows"),
    Row("nothing", lambda _, folder: folder / "absent", "no such model", "!no such file"),
    # damaged
    refused("cut in its length", damaged("sd15_real", lambda data: data[:5]), "not a safetensors"),
    refused("cut in its header", damaged("sd15_real", lambda data: data[:5000]), "ends after"),
    refused("cut in its weights", damaged("sd15_real", odd.cut(0.7)), "the file holds"),
    refused("cut at its end", damaged("sd15_real", lambda data: data[:-1]), "the file holds"),
    refused("zeros at its end", damaged("sd15_real", odd.with_zeros_at_the_end), "are all zero"),
    refused("a name twice", damaged("sd15_real", odd.with_a_name_twice), "stands there twice"),
    Row("NaN", one("sd15_real", extra=NAN), r"hold a NaN.*", "base model", late=True),
    Row(
        "another shape",
        one("sd15_real", extra={f"{UNET}out.0.bias": torch.ones(16)}),
        "1 tensors do not fit",
        "!1 tensors do not fit",
    ),
]


@pytest.fixture
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    row: Row = request.param
    yield row.build(request.getfixturevalue, tmp_path)
    shutil.rmtree(tmp_path)  # pytest keeps three runs, and models are large


def measured(say: Callable[[], Said]) -> Said:
    """What is said, within its time."""
    start = time.process_time()  # other processes on a busy machine do not count
    try:
        return say()
    finally:
        assert time.process_time() - start < SECONDS


def require_refusal(say: Callable[[], object], why: str, path: Path) -> None:
    """It is refused for this reason, with a hint, and named in visible characters."""
    with pytest.raises(ModelError) as error:
        measured(say)
    message = " ".join([str(error.value), *error.value.problems])
    assert re.search(why, message), message
    assert message.isprintable()
    assert error.value.hint and error.value.exit_code == 4
    assert path.name in message or path.parent.name in message


@pytest.mark.parametrize(
    ("row", "path"), [(row, row) for row in TABLE], indirect=["path"], ids=[r.name for r in TABLE]
)
def test_what_is_said(row: Row, path: Path) -> None:
    what_train_says(row, path)
    what_inspect_says(row, path)


def what_train_says(row: Row, path: Path) -> None:
    if row.train and not row.late:
        require_refusal(lambda: look_at(str(path)), row.train, path)
        return
    facts = measured(lambda: look_at(str(path)))
    if row.late:
        require_refusal(lambda: load_unet(path), row.train, path)
    assert ("unknown" in row.name) == any("are not used: embedding_" in n for n in facts.notes)


def what_inspect_says(row: Row, path: Path) -> None:
    if row.inspect.startswith("!"):
        require_refusal(lambda: inspect_path(path), row.inspect[1:], path)
        return
    facts = measured(lambda: inspect_path(path))
    assert facts["kind"] == row.inspect
    text = as_text(facts)
    assert text.replace("\n", "").isprintable() and as_json(facts).isascii()
    if row.inspect != "adapter":
        assert (facts["to train with it"] == "nothing is missing") == (not row.train or row.late)
    else:
        assert facts["modules"] == 192


def test_names_of_rows_are_different() -> None:
    assert len({row.name for row in TABLE}) == len(TABLE) >= 35

"""Folders of diffusers: parts, weights with variants and shards, configs from allow-lists."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler
from safetensors.torch import save_file
from transformers import CLIPTextConfig

from eri.errors import ModelError
from eri.formats.diffusers_folder import (
    component,
    is_folder,
    scheduler_config,
    stored_tensors,
    text_config,
    vae_config,
    weights,
)


def put(path: Path, content: Any = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_is_folder(tmp_path: Path) -> None:
    assert not is_folder(tmp_path)
    assert not is_folder(tmp_path / "none")
    put(tmp_path / "model_index.json")
    assert is_folder(tmp_path)


def test_component_is_inside_or_the_folder_itself(tmp_path: Path) -> None:
    put(tmp_path / "unet" / "config.json")
    assert component(tmp_path, "unet") == tmp_path / "unet"
    assert component(tmp_path / "unet", "unet") == tmp_path / "unet"
    with pytest.raises(ModelError, match="no folder vae"):
        component(tmp_path, "vae")
    with pytest.raises(ModelError, match="no such folder"):
        component(tmp_path / "none", "vae")


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        (["model.safetensors", "model.fp16.safetensors"], "model.safetensors"),
        (["model.fp16.safetensors", "pytorch_model.bin"], "model.fp16.safetensors"),
        (
            ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"],
            "diffusion_pytorch_model.safetensors",
        ),
        (["diffusion_pytorch_model.fp16.safetensors"], "diffusion_pytorch_model.fp16.safetensors"),
    ],
)
def test_full_precision_is_taken_before_fp16(
    tmp_path: Path, present: list[str], chosen: str
) -> None:
    for name in present:
        put(tmp_path / name)
    assert weights(tmp_path) == [tmp_path / chosen]


SHARDS = ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    "index",
    [
        "diffusion_pytorch_model.safetensors.index.json",
        "model.safetensors.index.json",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "model.fp16.safetensors.index.json",
    ],
)
def test_shards_come_from_the_index(tmp_path: Path, index: str) -> None:
    shards = [put(tmp_path / name) for name in SHARDS]
    put(tmp_path / index, {"weight_map": {"b": SHARDS[1], "a": SHARDS[0], "c": SHARDS[1]}})
    assert weights(tmp_path) == shards


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (SHARDS, "1 of 2 weight files are missing"),
        (["../secret.safetensors"], "weight_map does not name"),
        (["/etc/x.safetensors"], "weight_map does not name"),
        (["m.bin"], "weight_map does not name"),
        ([7], "weight_map does not name"),
        ([], "weight_map does not name"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, names: list[Any], problem: str) -> None:
    folder = tmp_path / "unet"
    put(tmp_path / "secret.safetensors")
    put(folder / SHARDS[0])
    index = folder / "model.safetensors.index.json"
    put(index, {"weight_map": dict(enumerate(names))})
    with pytest.raises(ModelError, match=problem):
        weights(folder)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    secret = put(tmp_path / "secret.safetensors")
    index = put(
        tmp_path / "unet" / "model.safetensors.index.json", {"weight_map": {"a": SHARDS[0]}}
    )
    (index.parent / SHARDS[0]).symlink_to(secret)
    with pytest.raises(ModelError, match="leads out of its folder"):
        weights(index.parent)


@pytest.mark.parametrize("blobs", ["hub/models--a--b/blobs", "hub/blobs/ab"])
def test_a_snapshot_of_the_hub_links_into_its_blobs(tmp_path: Path, blobs: str) -> None:
    unet = tmp_path / "hub/models--a--b/snapshots/0123/unet"
    put(unet / "model.safetensors.index.json", {"weight_map": {"a": SHARDS[0]}})
    (unet / SHARDS[0]).symlink_to(put(tmp_path / blobs / "c0ffee"))
    assert weights(unet) == [unet / SHARDS[0]]
    (unet / SHARDS[0]).unlink()
    (unet / SHARDS[0]).symlink_to(put(tmp_path / "hub/models--c--d/secret"))
    with pytest.raises(ModelError, match="leads out of its folder"):
        weights(unet)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no weights"):
        weights(tmp_path)
    put(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match=r"a pickle, diffusion_pytorch_model\.bin"):
        weights(tmp_path)


def test_tensors_of_all_shards_by_name(tmp_path: Path) -> None:
    shards = dict(zip("ab", SHARDS, strict=True))
    put(tmp_path / "model.safetensors.index.json", {"weight_map": shards})
    for name, shard in shards.items():
        save_file({name: torch.ones(2, 3)}, tmp_path / shard)
    stored = stored_tensors(tmp_path)
    assert {name: file.name for name, (file, _, _) in stored.items()} == shards
    assert [(key, info.shape) for _, key, info in stored.values()] == [("a", (2, 3)), ("b", (2, 3))]
    save_file({"a": torch.ones(2)}, tmp_path / SHARDS[1])
    with pytest.raises(ModelError, match=f"a is in this file and in {SHARDS[0]}"):
        stored_tensors(tmp_path)


def test_a_download_that_ends_in_zeros_is_refused(tmp_path: Path) -> None:
    save_file({str(n): torch.zeros(2, 3) for n in range(5)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="cut short"):
        stored_tensors(tmp_path)


TINY_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "scaling_factor": 0.13025,
}


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def test_vae_config_builds_the_same_autoencoder(tmp_path: Path) -> None:
    original = AutoencoderKL(**TINY_VAE)
    original.save_config(tmp_path)
    again = AutoencoderKL(**vae_config(tmp_path))
    assert public(again.config) == public(original.config)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"latents_mean": [0.0] * 4}, "1 things"),
        ({"shift_factor": 0.1}, "1 things"),
        ({"use_quant_conv": False}, "1 things"),
        ({"act_fn": "relu"}, "1 things"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types is"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types is"),
        ({"norm_num_groups": 3}, "norm_num_groups is 3"),
        ({"scaling_factor": 0}, "scaling_factor is 0"),
        ({"_class_name": "AutoencoderTiny"}, "_class_name is"),
    ],
)
def test_other_autoencoders_are_refused(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    put(tmp_path / "config.json", TINY_VAE | change)
    with pytest.raises(ModelError, match=problem):
        vae_config(tmp_path)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
        {"hidden_size": 64, "vocab_size": 1000, "hidden_act": "gelu", "num_hidden_layers": 2},
    ],
)
def test_text_config_describes_the_same_encoder(tmp_path: Path, given: dict[str, Any]) -> None:
    original = CLIPTextConfig(**given)
    original.save_pretrained(tmp_path)
    assert CLIPTextConfig(**text_config(tmp_path)).to_dict() == original.to_dict()


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"model_type": "t5"}, "model_type is 't5', supported is clip_text_model"),
        ({"use_attention_mask": True}, "use_attention_mask is True, supported is false"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"hidden_size": "768"}, "hidden_size is '768'"),
        ({"hidden_size": 100}, "num_attention_heads is missing, supported is a divisor"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is"),
    ],
)
def test_other_text_encoders_are_refused(
    tmp_path: Path, config: dict[str, Any], problem: str
) -> None:
    put(tmp_path / "config.json", config)
    with pytest.raises(ModelError, match=problem):
        text_config(tmp_path)


def test_code_in_a_text_config_goes_nowhere(tmp_path: Path) -> None:
    put(tmp_path / "config.json", {"auto_map": {"AutoModel": "evil.Model"}, "hidden_size": 64})
    assert "auto_map" not in text_config(tmp_path)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_scheduler_config(tmp_path: Path, scheduler: Any) -> None:
    made = scheduler(**BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    made.save_config(tmp_path / "scheduler")
    found = scheduler_config(tmp_path)
    assert (found.beta_start, found.beta_end) == (0.00085, 0.012)
    assert (found.beta_schedule, found.num_train_timesteps) == ("scaled_linear", 1000)
    assert found.prediction_type == "v_prediction"
    assert found.rescale_betas_zero_snr


def test_a_scheduler_says_epsilon_by_silence(tmp_path: Path) -> None:
    put(tmp_path / "scheduler" / "scheduler_config.json", BETAS)
    assert scheduler_config(tmp_path).prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({}, "beta_start is missing"),
        (BETAS | {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is"),
        (BETAS | {"prediction_type": "sample"}, "prediction_type is"),
        (BETAS | {"trained_betas": [0.1]}, "trained_betas is"),
        (BETAS | {"beta_end": 2}, "beta_end is 2"),
    ],
)
def test_other_schedules_are_refused(tmp_path: Path, config: dict[str, Any], problem: str) -> None:
    put(tmp_path / "scheduler" / "scheduler_config.json", config)
    with pytest.raises(ModelError, match=problem):
        scheduler_config(tmp_path)


def test_a_missing_scheduler(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"scheduler_config\.json is missing"):
        scheduler_config(tmp_path)

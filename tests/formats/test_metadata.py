"""Header text: what UIs look for is there, and nothing that tells on the data."""

import json
from typing import Any

import pytest

import eri
from eri.formats.metadata import BASES, Folder, adapter_metadata, data_metadata, without_data


def made(**change: Any) -> dict[str, str]:
    given: dict[str, Any] = {
        "family": "sd15",
        "rank": 16,
        "alpha": 8.0,
        "name": "cat",
        "steps": 250,
        "resolution": 512,
        "prediction": "epsilon",
    }
    return adapter_metadata(**(given | change))


def test_every_value() -> None:
    assert made() == {
        "ss_base_model_version": "sd_v1",
        "ss_clip_skip": "None",
        "ss_network_alpha": "8",
        "ss_network_dim": "16",
        "ss_network_module": "networks.lora",
        "ss_output_name": "cat",
        "ss_resolution": "(512, 512)",
        "ss_steps": "250",
        "ss_v2": "False",
        "ss_zero_terminal_snr": "False",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.implementation_version": f"eri/{eri.__version__}",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": "512x512",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "cat",
    }


def test_what_is_told_when_it_is_known() -> None:
    told = made(
        base="models/Some [v2] 模型 (pruned).safetensors",
        clip_skip=2,
        zero_terminal_snr=True,
        trigger_phrase="a photo of sks cat",
    )
    plain = made()
    assert {key: value for key, value in told.items() if plain.get(key) != value} == {
        "ss_sd_model_name": "Some [v2] 模型 (pruned).safetensors",
        "ss_clip_skip": "2",
        "ss_zero_terminal_snr": "True",
        "modelspec.encoder_layer": "2",
        "modelspec.trigger_phrase": "a photo of sks cat",
    }


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("demo", "demo"),
        ("/home/jane/models/sd15/", "sd15"),
        ("C:\\Users\\jane\\sd15.safetensors", "sd15.safetensors"),
        ("owner/name@main", "name@main"),
        ("/home/jane/\udcff.safetensors", "?.safetensors"),  # bytes that are no text
    ],
    ids=["name", "folder", "Windows", "Hub", "no text"],
)
def test_of_the_base_model_only_its_name_is_told(base: str, name: str) -> None:
    metadata = made(base=base)
    assert metadata["ss_sd_model_name"] == name
    assert json.loads(json.dumps(metadata).encode()) == metadata
    assert data_metadata(base, [])["ss_sd_model_name"] == name


def test_every_value_is_text() -> None:
    """The format has no other; a reader of JSON sees no value that it would take for an object."""
    for value in made(base="a", clip_skip=1, trigger_phrase="b").values():
        assert isinstance(value, str)
        assert value
        assert not value.startswith("{")


def seen_by_a1111(metadata: dict[str, str]) -> str:
    """The rule by which A1111 1.10 sorts adapters."""
    if metadata["ss_base_model_version"].startswith("sdxl_"):
        return "sdxl"
    return "sd21" if metadata["ss_v2"] == "True" else "sd15"


@pytest.mark.parametrize(("family", "prediction"), BASES)
def test_each_family_is_recognised(family: str, prediction: str) -> None:
    found = made(family=family, prediction=prediction)
    assert seen_by_a1111(found) == family
    assert found["modelspec.prediction_type"] == prediction.removesuffix("_prediction")
    assert found["modelspec.architecture"].endswith("/lora")
    assert found["ss_v2"] == ("True" if family == "sd21" else "False")
    assert ("xl" in found["modelspec.architecture"]) == (family == "sdxl")
    assert found["modelspec.implementation"] == (
        "https://github.com/Stability-AI/generative-models" if family == "sdxl" else "diffusers"
    )


def test_data_is_told_in_the_shape_that_a1111_reads() -> None:
    folders = [
        Folder("photos/cats", 3, False, ["Cat, sitting", "cat, asleep"]),
        Folder("dogs", 1, False, ["dog"]),
        Folder("any", 2, True, ["a photo"]),
    ]
    metadata = data_metadata("sd15", folders)
    assert metadata["ss_sd_model_name"] == "sd15"
    assert metadata["ss_num_train_images"] == "7"  # with their repeats, as kohya's scripts count
    assert metadata["ss_num_reg_images"] == "2"
    tags = json.loads(metadata["ss_tag_frequency"])
    assert tags == {"photos/cats": {"cat": 2, "sitting": 1, "asleep": 1}, "dogs": {"dog": 1}}
    told = json.loads(metadata["ss_dataset_dirs"])
    assert told == {
        "photos/cats": {"n_repeats": 3, "img_count": 2},
        "dogs": {"n_repeats": 1, "img_count": 1},
    }
    assert json.loads(metadata["ss_reg_dataset_dirs"]) == {"any": {"n_repeats": 2, "img_count": 1}}
    assert "ss_num_reg_images" not in data_metadata("sd15", folders[:2])


def test_what_goes_along_to_another_file() -> None:
    own = made(base="sd15.safetensors", clip_skip=2, trigger_phrase="cat")
    data = {
        "ss_tag_frequency": "{}",
        "ss_dataset_dirs": "{}",
        "ss_num_train_images": "3",
        "ss_training_comment": "for jane",
        "ssmd_author": "jane",
        "modelspec.hash_sha256": "0x00",  # of the file's own numbers
        "lora_adapter_metadata": "{}",
    }
    assert without_data(own | data) == own


@pytest.mark.parametrize("name", ["/home/jane/sd15.safetensors", "jane\\sd15", "owner/name"])
def test_a_base_model_told_by_its_path_stays_behind(name: str) -> None:
    assert without_data({"ss_sd_model_name": name, "ss_v2": "False"}) == {"ss_v2": "False"}

"""Header text: what UIs look for is there, and nothing that tells on the data."""

import json
from typing import Any

import pytest

import eri
from eri.formats.metadata import BASES, adapter_metadata, data_metadata


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
        "ss_network_alpha": "8",
        "ss_network_dim": "16",
        "ss_network_module": "networks.lora",
        "ss_output_name": "cat",
        "ss_steps": "250",
        "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.implementation_version": f"eri/{eri.__version__}",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": "512x512",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "cat",
    }


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


def test_data_is_told_in_the_shape_that_a1111_reads() -> None:
    captions = {"photos/cats": ["Cat, sitting", "cat, asleep"], "dogs": ["dog"]}
    metadata = data_metadata("sd15", captions)
    assert metadata["ss_sd_model_name"] == "sd15"
    assert metadata["ss_num_train_images"] == "3"
    tags = json.loads(metadata["ss_tag_frequency"])
    assert tags == {"photos/cats": {"cat": 2, "sitting": 1, "asleep": 1}, "dogs": {"dog": 1}}
    folders = json.loads(metadata["ss_dataset_dirs"])
    assert folders["photos/cats"] == {"n_repeats": 1, "img_count": 2}

"""The text in an adapter's header that UIs sort, filter and show it by.

Keys that begin with `ss_` are kohya's, `modelspec.` those of the SAI Model Spec 1.0.1. What an
adapter was trained on, captions and folders, is in `data_metadata` alone.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eri import __version__
from eri.formats.diffusers_folder import Prediction
from eri.formats.parts import Family

__all__ = ["Folder", "adapter_metadata", "data_metadata", "family_metadata", "without_data"]

# (family, prediction): kohya's base version, and the architecture of the Model Spec
BASES: dict[tuple[Family, Prediction], tuple[str, str]] = {
    ("sd15", "epsilon"): ("sd_v1", "stable-diffusion-v1"),
    ("sd15", "v_prediction"): ("sd_v1_v", "stable-diffusion-v1"),
    ("sd21", "epsilon"): ("sd_v2", "stable-diffusion-v2-512"),
    ("sd21", "v_prediction"): ("sd_v2_v", "stable-diffusion-v2-768-v"),
    ("sdxl", "epsilon"): ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    ("sdxl", "v_prediction"): ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}

IMPLEMENTATIONS: dict[Family, str] = {  # whose names of the U-Net kohya's adapters have
    "sd15": "diffusers",
    "sd21": "diffusers",
    "sdxl": "https://github.com/Stability-AI/generative-models",
}

ABOUT_THE_ADAPTER = {
    "ss_base_model_version",
    "ss_clip_skip",
    "ss_network_alpha",
    "ss_network_args",
    "ss_network_dim",
    "ss_network_module",
    "ss_output_name",
    "ss_resolution",
    "ss_steps",
    "ss_v2",
    "ss_zero_terminal_snr",
}
MODEL_NAME = "ss_sd_model_name"
ABOUT_THE_FILE = "modelspec.hash_sha256"
SEPARATOR = re.compile(r"[/\\]")


def adapter_metadata(
    *,
    family: Family,
    rank: int,
    alpha: float,
    name: str,
    steps: int,
    resolution: int,
    prediction: Prediction,
    base: str | None = None,
    clip_skip: int | None = None,
    zero_terminal_snr: bool = False,
    trigger_phrase: str | None = None,
) -> dict[str, str]:
    """Header text for an adapter. No date is in it, so that the same run writes the same bytes.

    Args:
        family: of the base model; A1111 hides an adapter whose header tells another one.
        rank: r.
        alpha: of every module.
        name: shown as the title, and what A1111 takes in `<lora:name:1>`.
        steps: trained.
        resolution: side of the training images in pixels.
        prediction: what the net predicts.
        base: name of the base model's file or folder; of a path the last part alone is written.
        clip_skip: layer of CLIP, from the end, whose states are used; None is the usual one.
        zero_terminal_snr: whether the last timestep is pure noise.
        trigger_phrase: what a prompt needs for the adapter to show.
    """
    architecture = BASES[family, prediction][1]
    metadata = family_metadata(family, prediction) | {
        "ss_clip_skip": str(clip_skip),
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_dim": str(rank),
        "ss_network_module": "networks.lora",
        "ss_output_name": name,
        "ss_resolution": str((resolution, resolution)),
        "ss_steps": str(steps),
        "ss_zero_terminal_snr": str(zero_terminal_snr),
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": IMPLEMENTATIONS[family],
        "modelspec.implementation_version": f"eri/{__version__}",
        "modelspec.prediction_type": "epsilon" if prediction == "epsilon" else "v",
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": name,
    }
    if base is not None:
        metadata[MODEL_NAME] = _last_part(base)
    if clip_skip is not None:
        metadata["modelspec.encoder_layer"] = str(clip_skip)
    if trigger_phrase:
        metadata["modelspec.trigger_phrase"] = trigger_phrase
    return metadata


def family_metadata(family: Family, prediction: Prediction = "epsilon") -> dict[str, str]:
    """The text that UIs tell the family by; A1111 takes an adapter with any other text for SD1.

    Args:
        family: of the base model.
        prediction: what the net predicts; where that is not known the family's plain name stands.
    """
    version = BASES[family, prediction][0]
    return {"ss_base_model_version": version, "ss_v2": str(family == "sd21")}


@dataclass(frozen=True)
class Folder:
    """A folder of training images."""

    path: str
    repeats: int
    regularization: bool
    captions: Sequence[str]  # one for each image


def data_metadata(model: str, folders: Sequence[Folder]) -> dict[str, str]:
    """Header text that tells what an adapter was trained on.

    Args:
        model: the base model, by its name or path.
        folders: of its images.
    """
    trained = [folder for folder in folders if not folder.regularization]
    others = [folder for folder in folders if folder.regularization]

    def directories(some: Sequence[Folder]) -> str:
        return json.dumps(
            {f.path: {"n_repeats": f.repeats, "img_count": len(f.captions)} for f in some}
        )

    tags = {
        folder.path: Counter(
            tag.strip() for text in folder.captions for tag in text.lower().split(",")
        )
        for folder in trained
    }
    metadata = {
        MODEL_NAME: _last_part(model),
        "ss_num_train_images": str(sum(f.repeats * len(f.captions) for f in trained)),
        "ss_dataset_dirs": directories(trained),
        "ss_tag_frequency": json.dumps(tags),
    }
    if others:
        metadata["ss_num_reg_images"] = str(sum(f.repeats * len(f.captions) for f in others))
        metadata["ss_reg_dataset_dirs"] = directories(others)
    return metadata


def without_data(metadata: Mapping[str, str]) -> dict[str, str]:
    """What of a header's text tells of the adapter and nothing of the data, for another file."""
    return {
        key: value
        for key, value in metadata.items()
        if key in ABOUT_THE_ADAPTER
        or (key == MODEL_NAME and not SEPARATOR.search(value))
        or (key.startswith("modelspec.") and key != ABOUT_THE_FILE)
    }


def _last_part(path: str) -> str:
    """The name at the end of a path of any system, as text that a header can hold."""
    name = SEPARATOR.split(path.rstrip("/\\"))[-1]
    return name.encode(errors="replace").decode()  # a file's name may be no text at all

"""A base model in diffusers, one part at a time, in float32: what eri is compared with.

A folder of diffusers is loaded as it is. A single file is converted by diffusers' own
`from_single_file`. That needs configs: those of the family, from the Hub or its cache; where there
are none, or they do not fit, configs written from what eri has found out.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from eri.formats.parts import TextPart
from eri.formats.unet_config import UNetConfigFields
from eri.models.vocabulary import END, START, clip_vocabulary
from eri.run.base import BaseFacts

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
ALWAYS_ABSENT = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass
class DiffusersSide:
    """What diffusers computes with a model; of its parts no more than one is in memory.

    Attributes:
        facts: of the model.
        device: where it computes.
        folder: where configs are written, if they must be.
        notes: what a reader of the comparison should know.
    """

    facts: BaseFacts
    device: torch.device
    folder: Path
    notes: list[str] = field(default_factory=list)

    def unet(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The U-Net's answer."""
        return [answer(self._pipeline("unet").unet, inputs)]

    def vae(self, image: Tensor) -> list[Tensor]:
        """The scaled latent's mean and deviation, side by side, and the mean decoded again."""
        vae = self._pipeline("vae").vae
        latent = vae.encode(image).latent_dist
        scaled = torch.cat([latent.mean, latent.std]) * vae.config.scaling_factor
        return [scaled, vae.decode(latent.mean).sample.clamp(-1, 1)]

    def text(self, prompts: Sequence[str]) -> list[Tensor]:
        """The text states, and SDXL's pooled text."""
        endings = ("", "_2") if self._is_sdxl else ("",)
        names = (f"{name}{end}" for name in ("text_encoder", "tokenizer") for end in endings)
        pipeline = self._pipeline(*names)
        with quiet():
            encoded = pipeline.encode_prompt(
                list(prompts),
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )
        return [encoded[0], encoded[2]] if self._is_sdxl else [encoded[0]]

    def adapters(self, files: Sequence[Path], inputs: Sequence[Tensor]) -> list[Tensor]:
        """What each adapter changes in the U-Net's answer."""
        pipeline = self._pipeline("unet")
        base = answer(pipeline.unet, inputs)
        changes = []
        for file in files:
            with quiet():
                pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
            changes.append(answer(pipeline.unet, inputs) - base)
            pipeline.unload_lora_weights()
        return changes

    def _pipeline(self, *parts: str) -> Any:
        """A pipeline with nothing in it but some parts and the scheduler, in float32."""
        pipeline = StableDiffusionXLPipeline if self._is_sdxl else StableDiffusionPipeline
        names = pipeline._get_signature_keys(pipeline)[0]
        absent = (name for name in (*PARTS, *ALWAYS_ABSENT) if name in names and name not in parts)
        options = {"dtype": torch.float32, "local_files_only": True}
        options |= dict.fromkeys(absent)
        with quiet():
            return self._loaded(pipeline, options).to(self.device)

    @property
    def _is_sdxl(self) -> bool:
        return self.facts.spec.family == "sdxl"

    def _loaded(self, pipeline: Any, options: Mapping[str, Any]) -> Any:
        path = str(self.facts.path)
        if self.facts.path.is_dir():
            is_half = any(".fp16." in file.name for file in self.facts.parts.files["unet"])
            variant = "fp16" if is_half else None
            return pipeline.from_pretrained(path, variant=variant, **options)
        if not self.folder.exists():
            try:
                return pipeline.from_single_file(path, **options)
            except Exception as error:  # noqa: BLE001 - diffusers raises what it likes
                why = first_line(error)
                self.notes.append(f"diffusers has no configs that fit ({why}): eri's are used")
            write_configs(self.facts, self.folder)
        return pipeline.from_single_file(path, config=str(self.folder), **options)


def answer(unet: Any, inputs: Sequence[Tensor]) -> Tensor:
    """What diffusers' U-Net says; inputs as for eri's."""
    x, timesteps, context, *added = inputs
    names = ("text_embeds", "time_ids")
    conditions = dict(zip(names, added, strict=True)) if added else None
    return unet(x, timesteps, context, added_cond_kwargs=conditions).sample


def first_line(error: Exception) -> str:
    """What went wrong, in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and the progress bars of diffusers and transformers."""
    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])


def write_configs(facts: BaseFacts, folder: Path) -> None:
    """The files of a diffusers folder without its weights."""
    tower = "CLIPTextModelWithProjection" if len(facts.text) > 1 else "CLIPTextModel"
    index: dict[str, Any] = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    write(folder / "unet/config.json", unet_config(facts.unet.fields))
    write(
        folder / "scheduler/scheduler_config.json",
        {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    )
    if facts.vae is not None:
        index["vae"] = ["diffusers", "AutoencoderKL"]
        write(folder / "vae/config.json", facts.vae.config)
    for part, ending in zip(facts.text, ("", "_2"), strict=False):
        index[f"text_encoder{ending}"] = ["transformers", tower if ending else "CLIPTextModel"]
        index[f"tokenizer{ending}"] = ["transformers", "CLIPTokenizer"]
        ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}  # of all published configs
        write(folder / f"text_encoder{ending}/config.json", part.config | ids)
        write_tokenizer(part, folder / f"tokenizer{ending}")
    write(folder / "model_index.json", index)


def unet_config(fields: UNetConfigFields) -> dict[str, Any]:
    """Arguments for diffusers' `UNet2DConditionModel`."""
    attends = [any(depths) for depths in fields.down_depths]
    config: dict[str, Any] = {
        "in_channels": fields.in_channels,
        "out_channels": fields.out_channels,
        "block_out_channels": fields.block_channels,
        "layers_per_block": fields.layers_per_block,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attends],
        "up_block_types": [
            "CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attends)
        ],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if fields.mid_depth else "UNetMidBlock2D",
        "attention_head_dim": fields.heads,  # diffusers' name for the number of heads
        "cross_attention_dim": fields.context_dim,
        "use_linear_projection": fields.linear_projection,
        "upcast_attention": fields.upcast_attention,
        "norm_num_groups": fields.norm_groups,
        "norm_eps": fields.norm_eps,
        "sample_size": fields.sample_size,
        **depths_config(fields),
    }
    if fields.pooled_dim is not None and fields.time_id_dim is not None:
        config["addition_embed_type"] = "text_time"
        config["addition_time_embed_dim"] = fields.time_id_dim
        config["projection_class_embeddings_input_dim"] = fields.pooled_dim + 6 * fields.time_id_dim
    return config


def depths_config(fields: UNetConfigFields) -> dict[str, Any]:
    """How deep the transformers are: one number a level where that says it all, else all."""
    mid = fields.mid_depth or 1
    levels = [max(depths) or 1 for depths in fields.down_depths[:-1]] + [mid]
    down = [(n,) * fields.layers_per_block for n in levels]
    up = [(n,) * (fields.layers_per_block + 1) for n in reversed(levels)]
    if agree(fields.down_depths, down) and agree(fields.up_depths, up):
        return {"transformer_layers_per_block": levels}
    last = fields.down_depths[-1]
    return {
        "transformer_layers_per_block": [*fields.down_depths[:-1], last if any(last) else mid],
        "reverse_transformer_layers_per_block": fields.up_depths,
    }


def agree(found: tuple[tuple[int, ...], ...], made: list[tuple[int, ...]]) -> bool:
    """Whether depths are the same wherever there is a transformer."""
    return all(not any(one) or one == other for one, other in zip(found, made, strict=True))


def write_tokenizer(part: TextPart, folder: Path) -> None:
    """CLIP's tokenizer, which fills prompts up with the token that the part says."""
    vocabulary = clip_vocabulary()
    words = {index: word for word, index in vocabulary.ids.items()}
    write(folder / "vocab.json", vocabulary.ids)
    merges = ["#version: 0.2", *map(" ".join, vocabulary.merges), ""]
    (folder / "merges.txt").write_text("\n".join(merges), "utf-8")
    tokens = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": words[part.pad]}
    write(folder / "tokenizer_config.json", {"model_max_length": 77, **tokens})


def write(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file in a folder that is made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")

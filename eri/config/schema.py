"""Every setting of a run: its name, type, default, limits and meaning.

A description is one line with its unit; it is the hint when the value is wrong, and the reference
in the documentation. A setting is here when the program does what it says, not before.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from eri.config.section import PathText, Section, to_path
from eri.config.sources import DataSource
from eri.files import run_name

__all__ = [
    "TARGETS",
    "Adapter",
    "Config",
    "ModelSource",
    "Sample",
    "Save",
    "Train",
]

TARGETS = ("attn", "ff", "proj")
"""The groups of modules that `adapter.targets` may name."""

NOWHERE_ELSE = re.compile(
    r"""[<>:"|?*\\]|[. ]$|(?i:^(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\.|$))"""
)
"""In names that Windows, and a disk that is carried there, refuses or takes for a device."""
MAX_NAME_BYTES = 100  # file systems take 255, and the names of files are longer than the folder's


def _list(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _model_source(value: object) -> object:
    if isinstance(value, str):
        return {"path": value}
    if isinstance(value, dict | ModelSource):
        return value
    raise ValueError("'demo', a path, or a mapping with the key path")


def _data_sources(value: object) -> object:
    if isinstance(value, str):
        return ({"path": value},)
    if isinstance(value, dict):
        return (value,)
    if isinstance(value, list | tuple) and value:
        return tuple(value)
    raise ValueError("a folder, or a mapping with the key path, or a list of these")


def _named_folder(value: Path) -> Path:
    name = os.fsencode(value.name)
    if name in {b"", b".."} or name.startswith(b"-") or len(name) > MAX_NAME_BYTES:
        raise ValueError(
            f"a folder whose name, which becomes the adapter's, has at most {MAX_NAME_BYTES} bytes "
            "and does not begin with -"
        )
    if NOWHERE_ELSE.search(value.name):
        raise ValueError(
            "a folder whose name, which becomes the adapter's, other systems take, too: without "
            r"""any of < > : " | ? * \, no device's name like CON, no dot or space at its end"""
        )
    return value


def _targets(value: str) -> str:
    groups = value.split("+")
    if not set(groups) <= set(TARGETS) or len(set(groups)) < len(groups):
        raise ValueError(f"some of {', '.join(TARGETS)}, each once, joined with +")
    return value


def _instead_of_steps(value: int | None, info: ValidationInfo) -> int | None:
    if value is not None and info.data.get("steps", "auto") != "auto":
        raise ValueError("null where train.steps is a number; one of the two says how long")
    return value


class ModelSource(Section):
    """The base model that the adapter is trained on."""

    path: PathText = Field(
        description="'demo' for the bundled model, a diffusers folder, a .safetensors file, or a "
        "hub id owner/name[@revision]"
    )
    vae: PathText | None = Field(
        default=None,
        description="folder or file of another VAE; null takes the model's own",
    )
    text: PathText | None = Field(
        default=None,
        description="model, folder or file, whose text encoders are used; null takes the model's "
        "own",
    )
    prediction: Literal["auto", "epsilon", "v"] = Field(
        default="auto",
        description="what the U-Net predicts; auto is what the files say, else what it is measured "
        "to do",
    )
    zero_terminal_snr: Literal["auto"] | bool = Field(
        default="auto",
        description="whether the last timestep is pure noise; auto is what the files say, else "
        "what is measured",
    )
    clip_skip: Annotated[int, Field(ge=1, le=12)] | None = Field(
        default=None,
        description="layer of CLIP, from the end, whose states are used (SD1.x); 1 is the last",
    )
    windows: Literal["ui", "kohya"] = Field(
        default="ui",
        description="how captions of more than 75 tokens are joined: 77 states a window as ComfyUI "
        "and A1111 do, or 75 a window and 2 as kohya's scripts do",
    )


class Adapter(Section):
    """The LoRA: which modules it changes and how much it can hold."""

    rank: int = Field(default=16, ge=1, le=4096, description="inner dimension of every LoRA pair")
    alpha: float = Field(
        default_factory=lambda settings: float(settings["rank"]),
        gt=0,
        le=1e6,
        description="scale of the adapter: its update is multiplied by alpha / rank; the rank "
        "unless said",
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of an adapted module's inputs that the adapter does not see in a step",
    )
    targets: Annotated[str, AfterValidator(_targets)] = Field(
        default="attn+ff+proj",
        description="groups of modules that are adapted: attention, feed-forward, and the "
        "projections around the transformer blocks",
    )


class Train(Section):
    """The optimization: how long, how fast, and in which arithmetic."""

    steps: Literal["auto"] | Annotated[int, Field(ge=1, le=10_000_000)] = Field(
        default="auto", description="optimizer steps; auto derives them from the images"
    )
    epochs: Annotated[
        Annotated[int, Field(ge=1, le=100_000)] | None, AfterValidator(_instead_of_steps)
    ] = Field(
        default=None,
        description="times that each image is shown (times its repeats), instead of steps",
    )
    batch_size: int = Field(default=4, ge=1, le=4096, description="images of one shape in a batch")
    accumulate: int = Field(
        default=1, ge=1, le=4096, description="batches whose gradients make one step"
    )
    lr: float = Field(default=1e-4, gt=0, le=100, description="learning rate at its highest")
    weight_decay: float = Field(
        default=0.01, ge=0, le=1, description="decoupled weight decay of AdamW, times lr in a step"
    )
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant",
        description="the learning rate after the warm-up: constant, or down to 0 at the last step",
    )
    warmup: int = Field(
        default=0, ge=0, le=10_000_000, description="steps in which the learning rate rises from 0"
    )
    optimizer: Literal["adamw"] = Field(
        default="adamw", description="what turns gradients to steps"
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="gradients of a larger norm are scaled down to it; null never does"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto",
        description="type that the frozen model computes in; auto is fp32 on the CPU, bf16 where "
        "the card has it, else fp16 with loss scaling",
    )
    memory: Literal["auto", "fast", "small"] = Field(
        default="auto",
        description="how a batch is run: in the fastest way that fits into the GPU's free memory, "
        "maybe in parts, maybe with activations computed again (auto); whole and nothing computed "
        "again, whether it fits or not (fast); or in the least memory (small)",
    )
    backend: Literal["auto", "cuda", "reference"] = Field(
        default="auto", description="own CUDA kernels where there are some (auto), only, or never"
    )
    deterministic: bool = Field(
        default=False, description="bit-equal repetition on a GPU, at some cost in speed"
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="number that every random draw of the run comes from"
    )
    workers: Literal["auto"] | Annotated[int, Field(ge=0, le=64)] = Field(
        default="auto",
        description="processes that read samples ahead; auto is 2 with a GPU, else none",
    )


class Save(Section):
    """What is kept while training."""

    every: int = Field(default=250, ge=1, description="steps between two checkpoints")
    keep: int = Field(
        default=2, ge=1, description="newest checkpoints that are kept; adapters are all kept"
    )
    metadata: Literal["minimal", "full"] = Field(
        default="minimal",
        description="what an adapter file says of its training; full adds captions and paths",
    )
    trigger_phrase: str | None = Field(
        default=None, description="words that the adapter answers to, told in its file"
    )


class Sample(Section):
    """The preview images."""

    every: int = Field(default=250, ge=0, description="steps between two previews; 0 makes none")
    prompts: Annotated[
        tuple[str, ...], BeforeValidator(_list, json_schema_input_type=list[str])
    ] = Field(default=(), description="list of texts to draw; captions of the data if empty")
    negative: str = Field(default="", description="text that the images are guided away from")
    steps: int = Field(default=25, ge=1, le=1000, description="denoising steps of an image")
    guidance: float = Field(
        default=5.0, ge=0, le=100, description="scale of classifier-free guidance; 1 is without"
    )
    sampler: Literal["dpmpp_2m_karras", "euler"] = Field(
        default="dpmpp_2m_karras", description="method that draws the images"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the first image")
    size: Literal["auto"] | Annotated[int, Field(ge=64, le=4096, multiple_of=64)] = Field(
        default="auto", description="side of an image in pixels; auto is the model's own"
    )


def _output_beside_data(settings: dict[str, Any]) -> Path:
    folder = os.path.abspath(settings["data"][0].path)
    return Path("runs") / run_name(os.path.basename(folder))


class Config(Section):
    """Everything that a run is told."""

    model: Annotated[
        ModelSource, BeforeValidator(_model_source, json_schema_input_type=str | ModelSource)
    ] = Field(description="base model: a path, or a mapping")
    data: Annotated[
        tuple[DataSource, ...],
        BeforeValidator(_data_sources, json_schema_input_type=str | list[DataSource]),
    ] = Field(description="images: a folder, or a list of mappings")
    output: Annotated[
        Path, BeforeValidator(to_path, json_schema_input_type=str), AfterValidator(_named_folder)
    ] = Field(
        default_factory=_output_beside_data,
        description="folder of the run; its name is the adapter's; runs/<data folder> unless said",
    )
    adapter: Adapter = Field(default=Adapter(), description="the LoRA")
    train: Train = Field(default=Train(), description="the optimization")
    save: Save = Field(default=Save(), description="what is kept")
    sample: Sample = Field(default=Sample(), description="the previews")

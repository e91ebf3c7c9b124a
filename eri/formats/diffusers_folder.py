"""A base model in the layout of diffusers: a folder for each part, each with a config and weights.

Nothing in such a folder is run: configs are read field by field, weights from safetensors only.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eri.errors import ModelError
from eri.files import contained
from eri.formats.foreign_config import ForeignConfig
from eri.formats.header import TensorInfo, read_header
from eri.formats.strict_json import read_object
from eri.formats.tail import require_written
from eri.formats.unet_config import UNetConfigFields, unet_config
from eri.printable import printable

__all__ = [
    "WEIGHT_FILES",
    "NoiseConfig",
    "Stored",
    "UNetConfigFields",
    "component",
    "is_folder",
    "scheduler_config",
    "shard_names",
    "stored_tensors",
    "text_config",
    "unet_config",
    "vae_config",
    "weights",
]

BetaSchedule = Literal["scaled_linear", "linear"]
Prediction = Literal["epsilon", "v_prediction"]
BETA_SCHEDULES: tuple[BetaSchedule, ...] = ("scaled_linear", "linear")
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction")

STEMS = ("diffusion_pytorch_model", "model")
WEIGHT_FILES = tuple(
    name
    for variant in ("", ".fp16")  # full precision first
    for stem in STEMS
    for name in (
        f"{stem}{variant}.safetensors",
        f"{stem}{variant}.safetensors.index.json",
        f"{stem}.safetensors.index{variant}.json",
    )
)
Stored = tuple[Path, str, TensorInfo]
"""Where a tensor is: a file, the name in it, and its shape."""

PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")

VAE_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "in_channels": (3,),
    "mid_block_add_attention": (True,),
    "out_channels": (3,),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}
VAE_FIELDS = (
    "block_out_channels",
    "down_block_types",
    "force_upcast",
    "latent_channels",
    "layers_per_block",
    "norm_num_groups",
    "sample_size",
    "scaling_factor",
    "up_block_types",
)


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """The noise schedule that a model was trained with; `prediction_type` is what its net says."""

    beta_start: float
    beta_end: float
    beta_schedule: BetaSchedule
    num_train_timesteps: int
    prediction_type: Prediction
    rescale_betas_zero_snr: bool


STABLE_DIFFUSION_NOISE = NoiseConfig(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    prediction_type="epsilon",
    rescale_betas_zero_snr=False,
)
"""Of every Stable Diffusion 1, 2 and XL; what its net predicts is told elsewhere."""


def is_folder(path: Path) -> bool:
    """Whether `path` is a whole model in this layout."""
    return (path / "model_index.json").is_file()


def component(path: Path, name: str) -> Path:
    """The folder of a part: `path/name`, or `path` itself when it is that part.

    Raises:
        ModelError: there is neither.
    """
    if (path / name).is_dir():
        return path / name
    if (path / "config.json").is_file():
        return path
    what = f"the model has no folder {name}" if path.is_dir() else "no such folder"
    raise ModelError(
        what,
        where=printable(path),
        hint="a diffusers folder is needed: model_index.json with unet, vae, … beside it",
    )


def weights(folder: Path) -> list[Path]:
    """The safetensors files of a part: one, or all shards that its index names.

    Raises:
        ModelError: there are none, or the index is damaged or names a file that is not there.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return _shards(folder / name) if name.endswith(".json") else [folder / name]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"the weights are a pickle, {printable(pickles[0])}, which can run code",
            where=printable(folder),
            hint="download the safetensors version, or convert it where it may run",
        )
    raise ModelError(
        f"there are no weights: no {STEMS[0]}.safetensors and no {STEMS[1]}.safetensors",
        where=printable(folder),
        hint="download the folder again",
    )


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a part's weight files, by its name.

    Raises:
        ModelError: there are none, or a file is damaged, or two hold the same tensor.
        DiskError: one may not be read.
    """
    found: dict[str, Stored] = {}
    for file in weights(folder):
        header = read_header(file)
        require_written(file, header)
        for name, info in header.tensors.items():
            if name in found:
                raise ModelError(
                    f"{printable(name)} is in this file and in {printable(found[name][0].name)}",
                    where=printable(file),
                    hint="download the folder again",
                )
            found[name] = file, name, info
    return found


def shard_names(index: Path) -> list[str]:
    """The safetensors files that an index names, each once, sorted; they lie beside it.

    Raises:
        ModelError: the index is damaged, or names something else than files beside it.
    """
    named = read_object(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(map(_is_plain, named.values())):
        what = "weight_map does not name the safetensors file of each tensor"
        raise ModelError(what, where=printable(index), hint="download the folder again")
    return sorted(set(named.values()))


def vae_config(folder: Path) -> dict[str, Any]:
    """Arguments for diffusers' `AutoencoderKL`, out of the config in the part's folder.

    Raises:
        ModelError: it is missing or damaged, or describes an autoencoder that is not supported.
    """
    config = ForeignConfig(folder / "config.json")
    config.choice("_class_name", ["AutoencoderKL"], default="AutoencoderKL")
    config.require_known(VAE_SUPPORTED, VAE_FIELDS)
    down = config.words("down_block_types", ["DownEncoderBlock2D"])
    up = config.words("up_block_types", ["UpDecoderBlock2D"])
    if len(up) != len(down):
        raise config.refuse("up_block_types", f"as many as down_block_types, {len(down)}")
    widths = config.integers("block_out_channels", count=len(down), default=64, at_most=2**13)
    groups = config.integer("norm_num_groups", default=32, at_most=2**13)
    if any(width % groups for width in widths):
        raise config.refuse("norm_num_groups", f"a divisor of every width, {list(widths)}")
    return {
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": widths,
        "norm_num_groups": groups,
        "layers_per_block": config.integer("layers_per_block", default=1, at_most=8),
        "latent_channels": config.integer("latent_channels", default=4, at_most=64),
        "sample_size": config.integer("sample_size", default=32, at_most=2**14),
        "scaling_factor": config.number("scaling_factor", default=0.18215, between=(0, 100)),
        "force_upcast": config.flag("force_upcast", default=True),
    }


def text_config(folder: Path) -> dict[str, Any]:
    """Arguments for transformers' `CLIPTextConfig`, out of the config in the part's folder.

    Fields that do not change what a CLIP text encoder computes are left out, the token ids among
    them: in the published configs they are not the tokenizer's.

    Raises:
        ModelError: it is missing or damaged, or describes something else.
    """
    config = ForeignConfig(folder / "config.json")
    config.choice("model_type", ["clip_text_model"], default="clip_text_model")
    width = config.integer("hidden_size", default=512, at_most=2**13)
    heads = config.integer("num_attention_heads", default=8, at_most=128)
    if width % heads:
        raise config.refuse("num_attention_heads", f"a divisor of hidden_size, {width}")
    if config.flag("use_attention_mask", default=False):
        raise config.refuse("use_attention_mask", "false")
    return {
        "hidden_size": width,
        "num_attention_heads": heads,
        "vocab_size": config.integer("vocab_size", default=49408, at_most=2**20),
        "intermediate_size": config.integer("intermediate_size", default=2048, at_most=2**15),
        "projection_dim": config.integer("projection_dim", default=512, at_most=2**13),
        "num_hidden_layers": config.integer("num_hidden_layers", default=12, at_most=128),
        "max_position_embeddings": config.integer(
            "max_position_embeddings", default=77, at_most=2**12
        ),
        "hidden_act": config.choice("hidden_act", ["quick_gelu", "gelu"], default="quick_gelu"),
        "layer_norm_eps": config.number("layer_norm_eps", default=1e-5, between=(0, 1)),
    }


def scheduler_config(path: Path) -> NoiseConfig:
    """The noise schedule, out of `scheduler/scheduler_config.json` of a whole model.

    Raises:
        ModelError: it is missing or damaged, or describes a schedule that is not supported.
    """
    config = ForeignConfig(path / "scheduler" / "scheduler_config.json")
    if "trained_betas" in config.values:
        raise config.refuse("trained_betas", "null")
    return NoiseConfig(
        beta_start=config.number("beta_start", between=(0, 1)),
        beta_end=config.number("beta_end", between=(0, 1)),
        beta_schedule=config.choice("beta_schedule", BETA_SCHEDULES),
        num_train_timesteps=config.integer("num_train_timesteps", default=1000, at_most=10**5),
        prediction_type=config.choice("prediction_type", PREDICTIONS, default="epsilon"),
        rescale_betas_zero_snr=config.flag("rescale_betas_zero_snr", default=False),
    )


def _shards(index: Path) -> list[Path]:
    folder = index.parent
    files = [contained(folder, name, links_into=_blobs(folder)) for name in shard_names(index)]
    missing = [printable(file.name) for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            f"{len(missing)} of {len(files)} weight files are missing",
            where=printable(folder),
            hint="download the folder again",
            problems=missing,
        )
    return files


def _blobs(folder: Path) -> list[Path]:
    """Where the files of a part really lie when it belongs to a snapshot in a cache of the Hub.

    `<cache>/models--owner--name/snapshots/<commit>/unet/x` is a link into `blobs/` of the
    repository, which may be one into `blobs/` of the cache.
    """
    repository = next((p.parent for p in folder.absolute().parents if p.name == "snapshots"), None)
    return [] if repository is None else [repository / "blobs", repository.parent / "blobs"]


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name

"""Small random base models of each family's real topology, as folders and as single files.

The folders are built by diffusers and transformers. Their single files are written from the
published rules (Stability AI's and OpenCLIP's names), without any of eri's own tables of names: a
test that writes with the code it reads proves nothing.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from tests.compvis_names import Tensors, compvis_unet_names, compvis_vae_name, open_clip
from tests.tiny import perturbed, save_tokenizer

MERGES = Path(__file__).parents[1] / "eri/models/clip/merges.txt.gz"
WIDTH = 64  # of every text encoder: one head, as CLIP's heads are 64 wide
START, END = "<|startoftext|>", "<|endoftext|>"
SD15_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 32, 64, 64),
    "attention_head_dim": 8,  # diffusers' name for the number of heads
    "cross_attention_dim": WIDTH,
}
SD21_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (64, 64, 64, 128),
    "attention_head_dim": [1, 1, 1, 2],
    "cross_attention_dim": WIDTH,
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": [1, 1, 2],
    "transformer_layers_per_block": [1, 1, 2],
    "cross_attention_dim": 2 * WIDTH,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": WIDTH + 6 * 256,
}

# ------------------------------------------------------------------------------ whole folders


def save_sd15_real(folder: Path, **unet: Any) -> Path:
    """SD1.5 with the real vocabulary, 32 groups in every norm and 8 heads.

    In all three, `unet` replaces fields of the U-Net's config (`in_channels=9`: inpainting).
    """
    from diffusers import PNDMScheduler

    torch.manual_seed(15)
    _save_unet(folder, SD15_UNET | unet)
    _save_vae(folder)
    _save_text(folder / "text_encoder", hidden_act="quick_gelu")
    _save_clip_tokenizer(folder / "tokenizer", pad=END)
    _save_scheduler(
        folder, PNDMScheduler, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
    )
    return _save_index(folder, "StableDiffusionPipeline", "PNDMScheduler")


def save_sd21(folder: Path, **unet: Any) -> Path:
    """SD2.1: a v model with linear projections, heads 64 wide, and OpenCLIP's first layers."""
    from diffusers import DDIMScheduler

    torch.manual_seed(21)
    _save_unet(folder, SD21_UNET | unet)
    _save_vae(folder)
    _save_text(folder / "text_encoder", hidden_act="gelu", projection_dim=512)
    _save_clip_tokenizer(folder / "tokenizer", pad="!")
    _save_scheduler(
        folder,
        DDIMScheduler,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return _save_index(folder, "StableDiffusionPipeline", "DDIMScheduler")


def save_sdxl(folder: Path, *, second_width: int = WIDTH, **unet: Any) -> Path:
    """SDXL base: three levels, the first without attention, and two text encoders.

    diffusers' reader of single files tells the encoders by their widths, so it needs a
    `second_width` other than the first.
    """
    from diffusers import EulerDiscreteScheduler

    torch.manual_seed(10)
    _save_unet(folder, SDXL_UNET | {"cross_attention_dim": WIDTH + second_width} | unet)
    _save_vae(folder, scaling_factor=0.13025, force_upcast=True)
    _save_text(folder / "text_encoder", hidden_act="quick_gelu")
    second = {"hidden_size": second_width, "num_attention_heads": second_width // WIDTH}
    _save_text(folder / "text_encoder_2", hidden_act="gelu", projected=True, **second)
    _save_clip_tokenizer(folder / "tokenizer", pad=END)
    _save_clip_tokenizer(folder / "tokenizer_2", pad="!")
    _save_scheduler(folder, EulerDiscreteScheduler, timestep_spacing="leading", steps_offset=1)
    return _save_index(folder, "StableDiffusionXLPipeline", "EulerDiscreteScheduler")


def _save_unet(folder: Path, config: Mapping[str, Any]) -> None:
    from diffusers import UNet2DConditionModel

    perturbed(UNet2DConditionModel(**config)).save_pretrained(folder / "unet")


def _save_vae(folder: Path, **config: Any) -> None:
    from diffusers import AutoencoderKL

    settings: dict[str, Any] = {
        "block_out_channels": (32, 32, 64, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "sample_size": 64,
    }
    perturbed(AutoencoderKL(**settings | config)).save_pretrained(folder / "vae")


def _save_text(folder: Path, *, projected: bool = False, **config: Any) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    settings: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 3 if projected else 2,
        "num_attention_heads": 1,
        "vocab_size": 49408,
        "projection_dim": WIDTH,
        "bos_token_id": 0,  # as all published configs have them, though they are not the real ids
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    build = CLIPTextModelWithProjection if projected else CLIPTextModel
    perturbed(build(CLIPTextConfig(**settings | config))).save_pretrained(folder)
    # Published folders have `text_model.` in every name; transformers >= 5.6 leaves it out.
    weights = folder / "model.safetensors"
    tensors = {_with_text_model(name): tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})


def _with_text_model(name: str) -> str:
    whole = name.startswith(("text_model.", "text_projection."))
    return name if whole else f"text_model.{name}"


def _save_scheduler(folder: Path, scheduler: type[Any], **config: Any) -> None:
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler(**schedule, **config).save_pretrained(folder / "scheduler")


def _save_index(folder: Path, pipeline: str, scheduler: str) -> Path:
    index: dict[str, object] = {
        "_class_name": pipeline,
        "_diffusers_version": "0.38.0",
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if (folder / "text_encoder_2").exists():
        index["force_zeros_for_empty_prompt"] = True
        index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        index["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
    else:
        index["feature_extractor"] = [None, None]
        index["safety_checker"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def _save_clip_tokenizer(folder: Path, *, pad: str) -> None:
    """CLIP's tokenizer as the published folders have it: 49408 tokens, padded with `pad`."""
    merges = gzip.decompress(MERGES.read_bytes()).decode().splitlines()[1:]
    symbols = _byte_symbols()
    ends = [f"{symbol}</w>" for symbol in symbols]
    joined = [merge.replace(" ", "") for merge in merges]
    special = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    tokens = {
        "bos_token": {"content": START, **special},
        "eos_token": {"content": END, **special},
        "unk_token": {"content": END, **special},
    }
    settings = {name: {"__type": "AddedToken", **token} for name, token in tokens.items()}
    save_tokenizer(
        folder, [*symbols, *ends, *joined, START, END], merges, pad_token=pad, **settings
    )
    table = json.dumps({**tokens, "pad_token": pad})
    (folder / "special_tokens_map.json").write_text(table)


def _byte_symbols() -> list[str]:
    """A visible character for each byte, in CLIP's order: first those that are visible."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    visible += range(ord("®"), ord("ÿ") + 1)
    return [*map(chr, visible), *(chr(256 + index) for index in range(256 - len(visible)))]


# ------------------------------------------------------------------------------- single files


def single_file(
    folder: Path,
    path: Path,
    *,
    without: Iterable[str] = (),
    dtype: torch.dtype | Callable[[str], torch.dtype] | None = None,
    unet: Literal["compvis", "bare", "diffusers"] = "compvis",
    vae: Literal["compvis", "bare", "vae.", "diffusers", "old_diffusers"] = "compvis",
    text: Literal["usual", "without_text_model", "sgm"] = "usual",
    projection: Literal["parameter", "weight"] = "parameter",
    conv_projections: bool = False,
    ema: bool = False,
    loose: bool = False,
    position_ids: torch.dtype = torch.int64,
    markers: Iterable[str] = (),
    extra: Mapping[str, torch.Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Rewrite a folder to one file as the sharing sites have them; every option is an oddity.

    Args:
        without: parts to leave out: `unet`, `vae`, `text`.
        dtype: of the weights, one for all or by name in the file (`mixed`); None: as they are.
        unet: whose names; `bare` are CompVis names without `model.diffusion_model.`.
        vae: whose names; `bare` and `vae.` are CompVis names without or with another prefix.
        text: `without_text_model` as some merges have CLIP-L; `sgm` puts SD2's encoder where SDXL
            has its first one (SD-turbo).
        projection: `weight` stores the projection [P, W] as text_projection.weight.
        conv_projections: store proj_in and proj_out of SD2 as 1x1 convolutions.
        ema: add a moving average of the U-Net, twice its weights.
        loose: add the schedule and, for CLIP-L, position ids of dtype `position_ids`.
        markers: names of empty tensors to add (`v_pred`, `ztsnr`).
        extra: any other tensors, by their whole names.
        metadata: of the header.
    """
    without = set(without)
    if unknown := without - {"unet", "vae", "text"}:
        raise ValueError(f"no such part: {unknown}")
    tensors: Tensors = {}
    if "unet" not in without:
        tensors |= _single_unet(folder, unet, conv_projections)
    if "vae" not in without:
        tensors |= _single_vae(folder, vae)
    if "text" not in without:
        tensors |= _single_text(folder, text, projection)
    if ema:
        tensors |= _moving_average(tensors)
    tensors = {name: _cast(name, tensor, dtype) for name, tensor in tensors.items()}
    if loose:
        tensors |= _loose_tensors(tensors, position_ids)
    tensors |= {marker: torch.empty(0) for marker in markers} | dict(extra or {})
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        path,
        dict(metadata) if metadata else None,
    )
    return path


def mixed(name: str) -> torch.dtype:
    """A dtype by name, for `single_file`: each part its own, and float32 for every bias."""
    if name.endswith("bias") or name.startswith("first_stage_model."):
        return torch.float32
    return torch.float16 if name.startswith("model.") else torch.bfloat16


def _cast(
    name: str, tensor: torch.Tensor, dtype: torch.dtype | Callable[[str], torch.dtype] | None
) -> torch.Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype(name) if callable(dtype) else dtype)


def _single_unet(folder: Path, naming: str, conv_projections: bool) -> Tensors:
    tensors = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    if conv_projections:
        tensors = {name: _as_conv(name, tensor) for name, tensor in tensors.items()}
    if naming == "diffusers":
        return tensors
    prefix = "" if naming == "bare" else "model.diffusion_model."
    names = compvis_unet_names(tensors)
    return {prefix + names[name]: tensor for name, tensor in tensors.items()}


def _as_conv(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if re.search(r"\.proj_(in|out)\.weight$", name) and tensor.ndim == 2:
        return tensor[:, :, None, None]
    return tensor


def _single_vae(folder: Path, naming: str) -> Tensors:
    tensors = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    if naming == "diffusers":
        return tensors
    if naming == "old_diffusers":
        return {_old_vae_name(name): tensor for name, tensor in tensors.items()}
    prefix = {"compvis": "first_stage_model.", "bare": "", "vae.": "vae."}[naming]
    return {
        prefix + compvis_vae_name(name): tensor[:, :, None, None]
        if ".attentions." in name and tensor.ndim == 2
        else tensor
        for name, tensor in tensors.items()
    }


def _old_vae_name(name: str) -> str:
    """As diffusers before 0.17 called the attention's layers."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return re.sub(r"\.(to_[qkv]|to_out\.0)\.", lambda found: f".{old[found[1]]}.", name)


def _single_text(folder: Path, layout: str, projection: str) -> Tensors:
    first = load_file(folder / "text_encoder/model.safetensors")
    activation = json.loads((folder / "text_encoder/config.json").read_text())["hidden_act"]
    is_open_clip = activation == "gelu"
    if layout != "usual" and is_open_clip != (layout == "sgm"):
        raise ValueError(f"no file of this family has its text encoder {layout!r}")
    if layout == "without_text_model":
        first = {name.removeprefix("text_model."): tensor for name, tensor in first.items()}
    if (folder / "text_encoder_2").exists():
        second = load_file(folder / "text_encoder_2/model.safetensors")
        return {
            **_prefixed("conditioner.embedders.0.transformer.", first),
            **_prefixed("conditioner.embedders.1.model.", open_clip(second, projection)),
        }
    if not is_open_clip:
        return _prefixed("cond_stage_model.transformer.", first)
    prefix = "conditioner.embedders.0.model." if layout == "sgm" else "cond_stage_model.model."
    return _prefixed(prefix, open_clip(_with_last_layer(first), projection))


def _prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _with_last_layer(tensors: Tensors) -> Tensors:
    """SD2's encoder with what its folder lacks: one more layer, and a projection; random ones."""
    generator = torch.Generator().manual_seed(2)
    layers = [int(name.split(".")[3]) for name in tensors if ".encoder.layers." in name]
    last = f".layers.{max(layers)}."
    extra = {
        name.replace(last, f".layers.{max(layers) + 1}."): torch.randn(
            tensor.shape, generator=generator
        )
        for name, tensor in tensors.items()
        if last in name
    }
    width = tensors["text_model.final_layer_norm.weight"].numel()
    extra["text_projection.weight"] = torch.randn(width, width, generator=generator)
    return tensors | extra


def _moving_average(tensors: Tensors) -> Tensors:
    if "model.diffusion_model.input_blocks.0.0.weight" not in tensors:
        raise ValueError("a moving average goes with a U-Net of CompVis names")
    copies = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): 2 * tensor
        for name, tensor in tensors.items()
        if name.startswith("model.diffusion_model.")
    }
    updates = torch.tensor(1000, dtype=torch.int32)
    return {**copies, "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": updates}


def _loose_tensors(tensors: Tensors, position_ids: torch.dtype) -> Tensors:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    loose = {
        "alphas_cumprod": torch.cumprod(1 - betas, 0),
        "betas": betas,
        "log_one_minus_alphas_cumprod": torch.log(1 - torch.cumprod(1 - betas, 0)),
        "logvar": torch.zeros(1000),
    }
    for name in tensors:
        if name.endswith("embeddings.position_embedding.weight"):
            place = name.replace("position_embedding.weight", "position_ids")
            loose[place] = torch.arange(77, dtype=torch.float32).to(position_ids)[None]
    return loose

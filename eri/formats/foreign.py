"""What a safetensors file is, when it is no base model that eri trains, told by its names.

The names are those that the models' own code and diffusers write. Free of torch: names out of a
header are enough.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from eri.errors import ModelError
from eri.printable import first_few, printable

__all__ = ["Kind", "foreign_kind", "refusal"]

BASE_OF_LORA = "set model: to the base model that it was made for; eri inspect tells what it is"
OTHER_FAMILY = "use a model of Stable Diffusion 1.x, 2.x or XL; eri trains no others"
ADDITION = "set model: to the base model itself, without additions"
PART = "set model: to a whole model, or to a U-Net with model.vae and model.text beside it"
OTHER_VAE = "the VAEs of SD1.x, SD2.x and SDXL are known"


@dataclass(frozen=True)
class Kind:
    """What a file is, one thing to do, and whether it is an adapter to a base model."""

    what: str
    hint: str
    adapter: bool = False


def _adapter(what: str) -> Kind:
    return Kind(what, BASE_OF_LORA, adapter=True)


def _family(what: str) -> Kind:
    return Kind(what, OTHER_FAMILY)


# The first rule that finds a name wins, so what is special stands before what is general.
RULES: tuple[tuple[str, Kind], ...] = (
    # additions to a base model
    (r"^(image_proj|ip_adapter)\.", Kind("an IP-Adapter", ADDITION)),
    (r"^lora_controlnet$", Kind("a Control-LoRA", ADDITION)),
    (r"(^|\.)dora_scale$|lora_magnitude_vector", _adapter("a DoRA adapter")),
    (r"\.hada_w[12]_[ab]$", _adapter("a LoHa adapter")),
    (r"\.lokr_w[12](_[ab])?$", _adapter("a LoKr adapter")),
    (r"\.oft_(blocks|diag|R)\b", _adapter("an OFT adapter")),
    (r"\.lora_(down|up|A|B)\.|lora(_linear_layer)?\.(down|up)\.weight$", _adapter("a LoRA")),
    (r"^(control_model|controlnet\w*|control_(all_x_embedder|layers))\.|^lllite_"
     r"|(^|\.)(zero_convs|input_hint_block|controlnet_\w+)\.", Kind("a ControlNet", ADDITION)),
    (r"^(adapter\.)?body\.\d+\.(resnets|in_conv|block[12])\.", Kind("a T2I-Adapter", ADDITION)),
    (r"(^|\.)motion_modules\.", Kind("an AnimateDiff motion module", ADDITION)),
    (r"(^|\.)position_net\.|\.fuser\.(attn|linear)", Kind("a GLIGEN model", ADDITION)),
    (r"string_to_param|^(emb_params|clip_l|clip_g|<.+>)$", Kind(
        "an embedding (textual inversion)", "set model: to the base model that it was made for")),
    # U-Nets of other kinds
    (r"\.(time_stack|time_mixer|temporal_transformer_blocks)\.|(^|\.)transformer_in\."
     r"|\.(temp_convs|temp_attentions|temopral_conv)\.", _family("a video model")),
    (r"(^|\.)(label_emb|class_embedding)\.weight$",
     Kind("the SD2 upscaler", "use Stable Diffusion 2.1 itself")),
    (r"(^|\.)class_embedding\.linear_1\.",
     Kind("an SD2 unCLIP model, made to vary images", "use Stable Diffusion 2.1 itself")),
    (r"(^|\.)time_embed(ding)?\.cond_proj\.", Kind(
        "a model distilled to few steps (LCM)", "use the model that it was distilled from")),
    (r"(^|\.)encoder_hid_proj\.|(^|\.)add_embedding\.(image|pool|text)_"
     r"|_blocks\.\d+\.attentions\.\d+\.add_k_proj\.",
     _family("a U-Net without CLIP (Kolors, Kandinsky, DeepFloyd IF or the like)")),
    (r"(^|\.)(clip_txt_(pooled_)?mapper|clip_mapper|effnet_mapper)\.", _family("Stable Cascade")),
    # diffusion transformers
    (r"(^|\.)(individual_)?token_refiner\.", _family("Hunyuan Video")),
    (r"(^|\.)(double_layers|joint_transformer_blocks)\.\d+\.", _family("AuraFlow")),
    (r"(^|\.)(double|single)_stream_modulation", _family("Flux 2")),
    (r"(^|\.)distilled_guidance_layer\.", _family("Chroma")),
    (r"(^|\.)double_blocks\.\d+\.img_attn|(^|\.)single_transformer_blocks\.", _family("Flux")),
    (r"(^|\.)(t5_yproj\.|pos_frequencies$)", _family("Mochi")),
    (r"(^|\.)joint_blocks\.\d+\.|(^|\.)transformer_blocks\.\d+\.norm1_context\.",
     _family("Stable Diffusion 3")),
    (r"(^|\.)transformer_blocks\.\d+\.img_mod\.", _family("Qwen-Image")),
    (r"(^|\.)(double|single)_stream_blocks\.", _family("HiDream")),
    (r"(^|\.)(noise|context)_refiner\.|(^|\.)cap_embedder\.", _family("Lumina or Z-Image")),
    (r"(^|\.)patch_embed\.text_proj\.", _family("CogView or CogVideoX")),
    (r"(^|\.)patchify_proj\.", _family("LTX-Video")),
    (r"(^|\.)caption_norm\.|\.ff\.conv_inverted\.|\.cross_attn\.kv_linear\.",
     _family("Sana or PixArt")),
    (r"(^|\.)head\.modulation$|(^|\.)condition_embedder\.time_embedder\.", _family("Wan")),
    (r"(^|\.)mlp_t5\.|(^|\.)time_extra_emb\.", _family("Hunyuan-DiT")),
    (r"(^|\.)adaln_single\.", _family("a diffusion transformer (PixArt, LTX-Video or the like)")),
    # text and image encoders
    (r"(^|\.)block\.\d+\.layer\.0\.SelfAttention\.", Kind("a T5 text encoder", PART)),
    (r"^(model\.)?layers\.\d+\.self_attn\.\w+_proj\.|^(model\.)?language_model\.",
     Kind("a language model", PART)),
    (r"^(vision_model|visual)\.", Kind("CLIP for images", PART)),
    # autoencoders of other kinds
    (r"^(taesd_)?(encoder|decoder)\.(layers\.)?\d+\.(weight|bias|conv\.)",
     Kind("a tiny autoencoder (TAESD), made for previews", OTHER_VAE)),
    (r"(^|\.)quantize\.embedding\.|\.condition_encoder\.|\.op_list\.|^decoder_unet\."
     r"|(en|de)coder\.(conv_in\.conv|(down|up)_blocks\.\d+\.\d+)\."
     r"|(en|de)coder\..+\.gamma$|\.time_conv(_out)?\.",
     Kind("an autoencoder of another kind of model", OTHER_VAE)),
    # everything else
    (r"(^|\.)RRDB_trunk\.|^body\.\d+\.(rdb1\.|weight$)|^model\.\d\.sub\.\d|^conv_first\.",
     _family("an image upscaler (ESRGAN or the like)")),
    (r"^((model\.)?diffusion_model\.|model\.|net\.|transformer\.)?"
     r"(transformer_blocks|blocks|layers)\.(block)?\d+\.",
     _family("a transformer without a U-Net")),
    (r"\.(absmax|quant_map|quant_state\.\w+|scale_weight|weight_scale|comfy_quant|q(weight|zeros)"
     r"|wscales|SCB)$|(^|\.)scaled_fp8$",
     Kind("a quantised model", "use the version in fp16, bf16, fp32 or plain fp8")),
)  # fmt: skip
COMPILED = tuple((re.compile(pattern), kind) for pattern, kind in RULES)
NUMBER = re.compile(r"\.\d+(?=\.)")


def foreign_kind(names: Iterable[str]) -> Kind | None:
    """What the tensors' names tell, where they tell of something that is no base model of ours."""
    alike = {NUMBER.sub(".0", name) for name in names}  # thousands of names are a few hundred
    for pattern, kind in COMPILED:
        if any(map(pattern.search, alike)):
            return kind
    return None


def refusal(path: Path, names: Iterable[str], wanted: str) -> ModelError:
    """The error for a file that does not hold what was wanted, saying what it is instead."""
    names = list(names)
    kind = foreign_kind(names)
    if kind is not None:
        return ModelError(
            f"this is {kind.what}, not {wanted}", where=printable(path), hint=kind.hint
        )
    why = f"eri knows none of its {len(names)} tensors" if names else "it holds no tensors"
    return ModelError(
        f"this is not {wanted}: {why}",
        where=printable(path),
        hint=OTHER_FAMILY,
        problems=first_few(names, lambda name: printable(name, limit=80)),
    )

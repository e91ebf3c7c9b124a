"""What a safetensors file is, when it is no base model that eri trains, told by its names.

Free of torch: names and shapes out of a header are enough.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from eri.errors import ModelError
from eri.formats.header import Header
from eri.printable import printable

__all__ = ["Kind", "foreign_kind", "refusal"]

SHOWN = 5  # names listed in a message

BASE_OF_LORA = "model: is the base model that it was made for; the LoRA itself is for eri inspect"
OTHER_FAMILY = "eri trains U-Net models: Stable Diffusion 1.x, 2.x and XL"
PART = "model: is a whole model, or a U-Net with model.vae and model.text beside it"


@dataclass(frozen=True)
class Kind:
    """What a file is, and one thing to do."""

    what: str
    hint: str


# The first rule that finds a name wins, so what is special stands before what is general.
RULES: tuple[tuple[str, Kind], ...] = (
    (r"\.(lora_down|lora_up|lora_A|lora_B|lora\.down|lora\.up)\.", Kind("a LoRA", BASE_OF_LORA)),
    (r"\.hada_w1_a$", Kind("a LoHa adapter", BASE_OF_LORA)),
    (r"\.lokr_w[12]", Kind("a LoKr adapter", BASE_OF_LORA)),
    (r"(^|\.)dora_scale$|lora_magnitude_vector", Kind("a DoRA adapter", BASE_OF_LORA)),
    (r"^(control_model|controlnet)", Kind("a ControlNet", OTHER_FAMILY)),
    (r"(^|\.)(zero_convs|input_hint_block|controlnet_down_blocks|controlnet_cond_embedding)\.",
     Kind("a ControlNet", OTHER_FAMILY)),
    (r"^(adapter\.body|body\.0\.resnets)\.", Kind("a T2I-Adapter", OTHER_FAMILY)),
    (r"^(image_proj|ip_adapter)\.", Kind("an IP-Adapter", OTHER_FAMILY)),
    (r"motion_modules\.", Kind("an AnimateDiff motion module", OTHER_FAMILY)),
    (r"\.time_stack\.|\.time_mixer\.|temporal_transformer_blocks\.",
     Kind("a video model (Stable Video Diffusion)", OTHER_FAMILY)),
    (r"(^|\.)joint_blocks\.", Kind("Stable Diffusion 3", OTHER_FAMILY)),
    (r"^transformer_blocks\.\d+\.norm1_context\.", Kind("Stable Diffusion 3", OTHER_FAMILY)),
    (r"individual_token_refiner\.", Kind("Hunyuan Video", OTHER_FAMILY)),
    (r"(^|\.)double_blocks\.\d+\.img_attn", Kind("Flux", OTHER_FAMILY)),
    (r"(^|\.)single_transformer_blocks\.", Kind("Flux", OTHER_FAMILY)),
    (r"(^|\.)double_layers\.\d+\.", Kind("AuraFlow", OTHER_FAMILY)),
    (r"(^|\.)noise_refiner\.", Kind("Lumina 2", OTHER_FAMILY)),
    (r"(^|\.)clip_txt_(pooled_)?mapper\.", Kind("Stable Cascade", OTHER_FAMILY)),
    (r"(^|\.)(adaln_single|adaln_modulation)\.", Kind("a diffusion transformer (PixArt or the "
     "like)", OTHER_FAMILY)),
    (r"(^|\.)blocks\.\d+\.(scale_shift_table|cross_attn\.|self_attn\.|adaLN_modulation)",
     Kind("a diffusion transformer (PixArt, Hunyuan, Wan or the like)", OTHER_FAMILY)),
    (r"(^|\.)block\.0\.layer\.0\.SelfAttention\.", Kind("a T5 text encoder", PART)),
    (r"^(model\.)?layers\.\d+\.self_attn\.q_proj\.|^model\.language_model\.",
     Kind("a language model", PART)),
    (r"^(vision_model|visual)\.", Kind("a CLIP image encoder", PART)),
    (r"string_to_param|^(emb_params|clip_l|clip_g)$",
     Kind("an embedding (textual inversion)", BASE_OF_LORA.replace("LoRA", "embedding"))),
    (r"(RRDB_trunk|^body\.\d+\.rdb1|^model\.1\.sub\.0\.RDB1|upsampler\.0\.weight$|conv_first\.)",
     Kind("an image upscaler (ESRGAN or the like)", OTHER_FAMILY)),
    (r"\.(absmax|quant_map|quant_state\.\w+|scale_weight|weight_scale|comfy_quant)$",
     Kind("a quantised model", "use the version in fp16, bf16, fp32 or plain fp8")),
)  # fmt: skip
COMPILED = tuple((re.compile(pattern), kind) for pattern, kind in RULES)


def foreign_kind(names: Iterable[str]) -> Kind | None:
    """What the tensors' names tell, where they tell of something that is no base model of ours."""
    names = list(names)
    for pattern, kind in COMPILED:
        if any(map(pattern.search, names)):
            return kind
    return None


def refusal(path: Path, header: Header, wanted: str) -> ModelError:
    """The error for a file that does not hold what was wanted, saying what it is instead."""
    kind = foreign_kind(header.tensors)
    if kind is not None:
        return ModelError(
            f"this is {kind.what}, not {wanted}", where=printable(path), hint=kind.hint
        )
    names = [printable(name, limit=80) for name in list(header.tensors)[:SHOWN]]
    more = [f"and {len(header.tensors) - SHOWN} more"] if len(header.tensors) > SHOWN else []
    return ModelError(
        f"this is not {wanted}: its {len(header.tensors)} tensors have other names",
        where=printable(path),
        hint=OTHER_FAMILY,
        problems=names + more,
    )

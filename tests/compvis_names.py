"""CompVis' and OpenCLIP's names of a base model's tensors, from the published rules.

They stand apart from eri's own tables of names, which are tested with files written by these.
"""

import re
from collections.abc import Iterable

import torch

Tensors = dict[str, torch.Tensor]

FIXED_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def compvis_unet_names(names: Iterable[str]) -> dict[str, str]:
    """The CompVis name of each of diffusers' names of a U-Net's tensors."""
    names = list(names)
    return {name: _compvis_unet_name(name, names) for name in names}


def _compvis_unet_name(name: str, names: list[str]) -> str:
    layer, _, kind = name.rpartition(".")  # kind: weight or bias
    if layer in FIXED_UNET:
        return f"{FIXED_UNET[layer]}.{kind}"
    if inner := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", layer):
        what, index, rest = inner.groups()
        position = 1 if what == "attentions" else 2 * int(index)
        return f"middle_block.{position}.{RESNET.get(rest, rest)}.{kind}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", layer)
    if found is None:
        raise ValueError(f"no rule for {name}")
    way, level, what, index, rest = found.groups()
    block = 3 * int(level) + int(index)
    if what == "downsamplers":
        return f"input_blocks.{3 * int(level) + 3}.0.op.{kind}"
    if what == "upsamplers":
        has_attention = any(other.startswith(f"up_blocks.{level}.attentions.") for other in names)
        return f"output_blocks.{3 * int(level) + 2}.{2 if has_attention else 1}.conv.{kind}"
    place = f"input_blocks.{block + 1}" if way == "down" else f"output_blocks.{block}"
    if what == "resnets":
        return f"{place}.0.{RESNET[rest]}.{kind}"
    return f"{place}.1.{rest}.{kind}"


VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def compvis_vae_name(name: str) -> str:
    """The CompVis name of one of diffusers' names of an autoencoder's tensors."""
    name = name.replace("conv_norm_out.", "norm_out.").replace("conv_shortcut.", "nin_shortcut.")
    if found := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(\w+)", name):
        side, layer, kind = found.groups()
        return f"{side}.mid.attn_1.{VAE_ATTENTION[layer]}.{kind}"
    if found := re.fullmatch(r"(\w+)\.mid_block\.resnets\.(\d)\.(.+)", name):
        side, index, rest = found.groups()
        return f"{side}.mid.block_{int(index) + 1}.{rest}"
    found = re.fullmatch(r"(\w+)\.(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name)
    if found is None:
        return name
    side, way, level, what, index, rest = found.groups()
    level = 3 - int(level) if way == "up" else int(level)
    if what == "resnets":
        return f"{side}.{way}.{level}.block.{index}.{rest}"
    return f"{side}.{way}.{level}.{way}sample.{rest}"


OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def open_clip(tensors: Tensors, projection: str = "parameter") -> Tensors:
    """Transformers' tensors of a text encoder as OpenCLIP's, with a scale of the logits."""
    result: Tensors = {"logit_scale": torch.tensor(4.6052)}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name == "text_projection.weight" and projection == "parameter":
            result["text_projection"] = tensor.T
        elif found is None:
            result[OPEN_CLIP.get(name, name)] = tensor
        elif found[2] in OPEN_CLIP_LAYER:
            layer = OPEN_CLIP_LAYER[found[2]]
            result[f"transformer.resblocks.{found[1]}.{layer}.{found[3]}"] = tensor
        elif found[2] == "self_attn.q_proj":
            rows = [tensors[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            place = f"transformer.resblocks.{found[1]}.attn.in_proj_{found[3]}"
            result[place] = torch.cat(rows)
    return result

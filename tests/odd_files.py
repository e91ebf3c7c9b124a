"""Files that people have and give to a trainer: models in odd layouts, damaged, or something else.

A builder makes one from the small models of `tests/families.py`: (models, folder) -> path, where
`models` gives the folder of a family by its fixture's name.
"""

import io
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from eri.adapters import attach
from eri.formats.adapter_file import Dialect, write_adapter
from eri.models import load_unet
from tests.families import save_sdxl, single_file

Models = Callable[[str], Path]
Builder = Callable[[Models, Path], Path]

UNET = "model.diffusion_model."
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"
SSD_1B = {
    "transformer_layers_per_block": [0, [2, 2], [1, 1]],
    "reverse_transformer_layers_per_block": [[1, 1, 3], [2, 1, 1], 0],
    "mid_block_type": "UNetMidBlock2D",
}
REFINER = {
    "block_out_channels": (32, 64, 64, 64),
    "down_block_types": (
        "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D",
    ),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": [1, 1, 1, 1],
    "transformer_layers_per_block": 1,
}  # fmt: skip


def whole(family: str, change: Callable[[Path], object] | None = None) -> Builder:
    """A folder of diffusers; changed where `change` is given."""

    def build(models: Models, folder: Path) -> Path:
        if change is None:
            return models(family)
        path = Path(shutil.copytree(models(family), folder / "model"))
        change(path)
        return path

    return build


def one(family: str, name: str = "model.safetensors", **options: Any) -> Builder:
    """A single file; options are those of `single_file`."""
    return lambda models, folder: single_file(models(family), folder / name, **options)


def built(fields: dict[str, Any], **options: Any) -> Builder:
    """A single file of an SDXL whose U-Net's config has other fields."""
    return lambda _, folder: single_file(
        save_sdxl(folder / "folder", **fields), folder / "model.safetensors", **options
    )


def damaged(family: str, change: Callable[[bytearray], bytes | bytearray]) -> Builder:
    """A single file whose bytes were changed."""

    def build(models: Models, folder: Path) -> Path:
        path = single_file(models(family), folder / "model.safetensors", without=["text"])
        path.write_bytes(change(bytearray(path.read_bytes())))
        return path

    return build


def text_file(family: str, rename: Callable[[str], str]) -> Builder:
    """A file with a text encoder alone."""

    def build(models: Models, folder: Path) -> Path:
        tensors = load_file(models(family) / TEXT_FILE)
        path = folder / "clip.safetensors"
        save_file({rename(name): tensor for name, tensor in tensors.items()}, path)
        return path

    return build


def adapter(dialect: Dialect) -> Builder:
    """A LoRA for SD1.5."""

    def build(models: Models, folder: Path) -> Path:
        path = folder / ("lora" if dialect == "peft" else "lora.safetensors")
        pairs = attach(load_unet(models("sd15_real")), rank=1).pairs()
        write_adapter(pairs, path, dialect=dialect, metadata={})
        return path

    return build


def names(*found: str) -> Builder:
    """A small tensor by each of these names."""

    def build(_: Models, folder: Path) -> Path:
        path = folder / "model.safetensors"
        save_file({name: torch.ones(2, 2) for name in found}, path)
        return path

    return build


def content(data: bytes, name: str = "model.safetensors") -> Builder:
    """A file of these bytes."""

    def build(_: Models, folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return build


# ------------------------------------------------------------------------- changes of a folder


def as_fp16_variant(model: Path) -> None:
    for path in model.rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))


def as_shards(model: Path) -> None:
    path = model / UNET_FILE
    tensors = load_file(path)
    path.unlink()
    shards = {f"diffusion_pytorch_model-0000{n + 1}-of-00002.safetensors": n for n in range(2)}
    table = {name: list(shards)[index % 2] for index, name in enumerate(tensors)}
    for shard in shards:
        save_file({n: t for n, t in tensors.items() if table[n] == shard}, path.parent / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    (path.parent / f"{path.name}.index.json").write_text(json.dumps(index))


def with_old_vae_names(model: Path) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    rename(
        model / "vae/diffusion_pytorch_model.safetensors",
        lambda name: re.sub(r"(to_[qkv]|to_out\.0)(?=\.)", lambda found: old[found[1]], name),
    )


def without_text_model(model: Path) -> None:
    rename(model / TEXT_FILE, lambda name: name.removeprefix("text_model."))


def rename(path: Path, rule: Callable[[str], str]) -> None:
    tensors = load_file(path)
    save_file({rule(name): tensor for name, tensor in tensors.items()}, path)


def with_pickles_only(model: Path) -> None:
    for path in [*model.rglob("*.safetensors")]:
        path.rename(path.with_suffix(".bin"))


def without(part: str) -> Callable[[Path], None]:
    return lambda model: shutil.rmtree(model / part)


# ---------------------------------------------------------------------------- changes of bytes


def cut(share: float) -> Callable[[bytearray], bytearray]:
    return lambda data: data[: int(share * len(data))]


def with_zeros_at_the_end(data: bytearray) -> bytes:
    whole = len(data) * 2 // 3
    return bytes(data[:whole]) + bytes(len(data) - whole)


def with_a_name_twice(data: bytearray) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    again = header[:-1] + b',"' + header.split(b'"', 2)[1] + b'":{}}'
    return len(again).to_bytes(8, "little") + bytes(again) + bytes(data[8 + length :])


def torch_archive() -> bytes:
    """What `torch.save` writes into a .ckpt: a zip archive."""
    file = io.BytesIO()
    torch.save({"state_dict": {"a": torch.ones(2)}}, file)
    return file.getvalue()


def old_pickle() -> bytes:
    """What it wrote before version 1.6."""
    return pickle.dumps({"state_dict": {}}, protocol=2)

"""CLIP text encoders as they lie on the disk: where each tensor is, by transformers' names.

    OpenCLIP                            transformers, without `text_model.`
    token_embedding.weight              embeddings.token_embedding.weight
    positional_embedding                embeddings.position_embedding.weight
    transformer.resblocks.N.ln_1, ln_2  encoder.layers.N.layer_norm1, layer_norm2
    ….attn.in_proj_weight, in_proj_bias ….self_attn.q_proj, k_proj, v_proj: a third of the rows each
    ….attn.out_proj                     ….self_attn.out_proj
    ….mlp.c_fc, mlp.c_proj              ….mlp.fc1, mlp.fc2
    ln_final                            final_layer_norm
    text_projection                     text_projection.weight, transposed

Free of torch.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eri.errors import ModelError
from eri.formats import diffusers_folder
from eri.formats.diffusers_folder import Stored
from eri.formats.header import TensorInfo
from eri.formats.parts import Piece, TextPart
from eri.formats.strict_json import read_object
from eri.printable import first_few, printable

__all__ = ["PROJECTION", "folder_parts", "hf_part", "openclip_part", "text_shapes"]

HEAD = 64  # width of a head in every CLIP text encoder
VOCABULARY = 49408
END, EXCLAMATION = 49407, 0  # what fills a prompt up: in OpenAI's models, in those of OpenCLIP
OPENCLIP_WIDTHS = (1024, 1280)  # of OpenCLIP-H and -bigG; OpenAI's CLIP-L has 768
H_WIDTH, H_USED = 1024, 23  # of OpenCLIP-H's 24 layers SD2 uses all but the last

TOKENS = "embeddings.token_embedding.weight"
POSITIONS = "embeddings.position_embedding.weight"
PROJECTION = "text_projection.weight"
FIRST_MLP = "encoder.layers.0.mlp.fc1.weight"
LAYER = re.compile(
    r"encoder\.layers\.(\d{1,2})\."
    r"(layer_norm[12]|self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.(weight|bias)"
)
SINGLE = {TOKENS, POSITIONS, PROJECTION, "final_layer_norm.weight", "final_layer_norm.bias"}
UNUSED = re.compile(r"(.*\.)?(position_ids|logit_scale)")

OPENCLIP = {
    "token_embedding.weight": TOKENS,
    "positional_embedding": POSITIONS,
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
    PROJECTION: PROJECTION,  # of some files; then it is not transposed
}
OPENCLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
RESBLOCK = re.compile(
    r"transformer\.resblocks\.(\d{1,2})\."
    rf"(?:({'|'.join(map(re.escape, OPENCLIP_LAYER))})\.|attn\.in_proj_)(weight|bias)"
)


def hf_part(file: Path, tensors: Mapping[str, tuple[str, TensorInfo]]) -> TextPart:
    """A text encoder of a file that has transformers' names, with or without `text_model.`.

    Args:
        file: a safetensors file.
        tensors: the name without the encoder's prefix, to the name in the file and its shape.

    Raises:
        ModelError: a name that no text encoder has, or shapes that make none.
    """
    pieces = _transformers({short: (file, *found) for short, found in tensors.items()}, file)
    width = _matrix(pieces, TOKENS, file)[1]
    # Shapes do not tell the activation. In these names a file holds OpenAI's CLIP-L, or an encoder
    # of OpenCLIP out of a folder of diffusers, and those are wider.
    is_openclip = width in OPENCLIP_WIDTHS
    config = _config(pieces, "gelu" if is_openclip else "quick_gelu", file)
    return TextPart(
        pieces=pieces,
        config=config,
        tokenizer=None,
        pad=EXCLAMATION if is_openclip else END,
    )


def openclip_part(
    file: Path, tensors: Mapping[str, tuple[str, TensorInfo]], *, penultimate: bool
) -> TextPart:
    """A text encoder of a file that has OpenCLIP's names.

    Args:
        file: a safetensors file.
        tensors: the name without the encoder's prefix, to the name in the file and its shape.
        penultimate: leave out the last layer and the projection, as SD2 does: it was trained on
            the states before them.

    Raises:
        ModelError: a name that no text encoder has, or shapes that make none.
    """
    pieces: dict[str, Piece] = {}
    unknown = []
    for short, (key, info) in tensors.items():
        if UNUSED.fullmatch(short):
            continue
        found = _openclip(short, Piece(file=file, key=key, dtype=info.dtype, shape=info.shape))
        if not found:
            unknown.append(key)
        _add(pieces, found)
    _refuse_unknown(unknown, file)
    width = _matrix(pieces, TOKENS, file)[1]
    if penultimate:
        pieces.pop(PROJECTION, None)
        last = _layers(pieces) - 1
        if (width, last + 1) != (H_WIDTH, H_USED):  # else a tool has left it out already
            start = f"encoder.layers.{last}."
            pieces = {name: piece for name, piece in pieces.items() if not name.startswith(start)}
    config = _config(pieces, "gelu", file)
    return TextPart(pieces=pieces, config=config, tokenizer=None, pad=EXCLAMATION)


def folder_parts(path: Path) -> tuple[TextPart, ...]:
    """The text encoders of a diffusers folder, in order: none, one, or SDXL's two.

    Args:
        path: the model's folder, or the folder of one text encoder; then its tokenizer is in that
            folder, or it is CLIP's.

    Raises:
        ModelError: a part is missing, damaged or not supported.
        DiskError: a file may not be read.
    """
    if (path / "text_encoder").is_dir():
        parts = [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")]
        return tuple(
            _folder_part(path / encoder, _tokenizer(diffusers_folder.component(path, tokenizer)))
            for encoder, tokenizer in parts
            if (path / encoder).is_dir()
        )
    if not path.is_dir():
        raise ModelError("no such file or folder", where=printable(path))
    config = path / "config.json"
    if not config.is_file() or read_object(config).get("model_type") != "clip_text_model":
        return ()
    return (_folder_part(path, path if _is_tokenizer(path) else None),)


def text_shapes(config: Mapping[str, Any], *, projected: bool) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a text encoder, by its name.

    transformers' own module would say so, too, but takes seconds to import.

    Args:
        config: of a `TextPart`.
        projected: whether it has a projection.
    """
    width, between = config["hidden_size"], config["intermediate_size"]
    weights: dict[str, tuple[int, ...]] = {
        "layer_norm1": (width,),
        **{f"self_attn.{which}_proj": (width, width) for which in ("q", "k", "v", "out")},
        "layer_norm2": (width,),
        "mlp.fc1": (between, width),
        "mlp.fc2": (width, between),
    }
    layers = {
        f"encoder.layers.{layer}.{name}": shape
        for layer in range(config["num_hidden_layers"])
        for name, shape in weights.items()
    }
    shapes: dict[str, tuple[int, ...]] = {
        TOKENS: (config["vocab_size"], width),
        POSITIONS: (config["max_position_embeddings"], width),
    }
    for name, shape in (layers | {"final_layer_norm": (width,)}).items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes | ({PROJECTION: (config["projection_dim"], width)} if projected else {})


def _folder_part(folder: Path, tokenizer: Path | None) -> TextPart:
    config = diffusers_folder.text_config(folder)
    pieces = _transformers(diffusers_folder.stored_tensors(folder), folder)
    if tokenizer is None and config["vocab_size"] < VOCABULARY:
        raise ModelError(
            f"this text encoder knows {config['vocab_size']} tokens, CLIP has {VOCABULARY}",
            where=printable(folder),
            hint="put its tokenizer's vocab.json and merges.txt into the same folder",
        )
    pad = END if config["hidden_act"] == "quick_gelu" else EXCLAMATION
    return TextPart(pieces=pieces, config=config, tokenizer=tokenizer, pad=pad)


def _tokenizer(folder: Path) -> Path:
    if not _is_tokenizer(folder):
        raise ModelError(
            "the tokenizer has neither tokenizer.json nor both vocab.json and merges.txt",
            where=printable(folder),
            hint="download the folder again",
        )
    return folder


def _is_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )


def _transformers(stored: Mapping[str, Stored], where: Path) -> dict[str, Piece]:
    pieces: dict[str, Piece] = {}
    unknown = []
    for short, (file, key, info) in stored.items():
        name = short.removeprefix("text_model.")
        if UNUSED.fullmatch(name):
            continue
        if name not in SINGLE and not LAYER.fullmatch(name):
            unknown.append(key)
        _add(pieces, {name: Piece(file=file, key=key, dtype=info.dtype, shape=info.shape)})
    _refuse_unknown(unknown, where)
    return pieces


def _openclip(name: str, whole: Piece) -> dict[str, Piece]:
    """What one tensor of OpenCLIP is in transformers: one tensor, three, or none that is known."""
    if name == "text_projection":
        return {PROJECTION: replace(whole, shape=whole.shape[::-1], transposed=True)}
    if name in OPENCLIP:
        return {OPENCLIP[name]: whole}
    match = RESBLOCK.fullmatch(name)
    if match is None:
        return {}
    layer, inner, kind = match.groups()
    place = f"encoder.layers.{layer}"
    if inner:
        return {f"{place}.{OPENCLIP_LAYER[inner]}.{kind}": whole}
    third, rest = divmod(whole.shape[0] if whole.shape else 1, 3)
    if rest:
        raise ModelError(
            f"{printable(whole.key)} is {list(whole.shape)}; its rows are those of three matrices",
            where=printable(whole.file),
            hint="the file is damaged: download it again",
        )
    return {
        f"{place}.self_attn.{which}_proj.{kind}": replace(
            whole,
            shape=(third, *whole.shape[1:]),
            rows=(index * third, (index + 1) * third),
        )
        for index, which in enumerate("qkv")
    }


def _add(pieces: dict[str, Piece], found: Mapping[str, Piece]) -> None:
    for name, piece in found.items():
        if name in pieces:
            raise ModelError(
                f"{printable(piece.key)} and {printable(pieces[name].key)} are the same tensor",
                where=printable(piece.file),
                hint="the file was put together wrongly: use another version",
            )
        pieces[name] = piece


def _refuse_unknown(keys: Sequence[str], where: Path) -> None:
    if keys:
        raise ModelError(
            f"{len(keys)} tensors belong to no CLIP text encoder",
            where=printable(where),
            hint="the text encoders of SD1.x, SD2.x and SDXL are known",
            problems=first_few(keys),
        )


def _config(pieces: Mapping[str, Piece], activation: str, where: Path) -> dict[str, Any]:
    """Arguments for transformers' `CLIPTextConfig`, out of the shapes."""
    tokens, width = _matrix(pieces, TOKENS, where)
    if width % HEAD or not width:
        raise _not_whole(f"it is {width} wide, which is no multiple of {HEAD}", where)
    if tokens < VOCABULARY:
        raise _not_whole(f"it knows {tokens} tokens, CLIP has {VOCABULARY}", where)
    projection = _matrix(pieces, PROJECTION, where)[0] if PROJECTION in pieces else width
    return {
        "hidden_size": width,
        "num_attention_heads": width // HEAD,
        "vocab_size": tokens,
        "intermediate_size": _matrix(pieces, FIRST_MLP, where)[0],
        "projection_dim": projection,
        "num_hidden_layers": _layers(pieces),
        "max_position_embeddings": _matrix(pieces, POSITIONS, where)[0],
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
    }


def _matrix(pieces: Mapping[str, Piece], name: str, where: Path) -> tuple[int, int]:
    """The shape of a tensor of two dimensions, neither of them empty."""
    shape = pieces[name].shape if name in pieces else ()
    if len(shape) != 2 or not all(shape):
        raise _not_whole(f"{name} is {list(shape) if name in pieces else 'missing'}", where)
    return shape[0], shape[1]


def _layers(pieces: Mapping[str, Piece]) -> int:
    return 1 + max((int(m[1]) for m in map(LAYER.fullmatch, pieces) if m), default=-1)


def _not_whole(why: str, where: Path) -> ModelError:
    return ModelError(
        f"the text encoder is not whole, or none of CLIP's: {why}",
        where=printable(where),
        hint="download it again; the text encoders of SD1.x, SD2.x and SDXL are known",
    )

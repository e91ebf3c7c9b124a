"""Input that is nearly right: whole files, changed a little or much by a random draw.

A change of bytes alone dies at the first check of a format, so lengths and checksums are set right
again in half of the cases, and headers are also made anew by their grammar.
"""

import json
import random
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eri.formats.header import DTYPE_BITS

__all__ = ["mutated_header", "mutated_image", "mutated_yaml"]

CORPUS = Path(__file__).with_name("corpus")

Change = Callable[[random.Random, bytearray], None]

NUMBERS = (
    b"0", b"-0", b"1", b"-1", b"1.0", b"1e3", b"1E400", b"00", b"255", b"65536", b"4294967296",
    b"9223372036854775807", b"9223372036854775808", b"18446744073709551616", b"9" * 400,
    b"9" * 5000, b"NaN", b"-Infinity", b"null", b"true", b'""', b"[]", b"{}", b"[" * 2000,
)  # fmt: skip
TEXTS = (
    b'""', b'"__metadata__"', b'"a"', b'"../a"', b'"/etc/passwd"', b'"\\u001b[2J"', b'"\\ud800"',
    b'"\\u0000"', b'"\xe2\x80\xae"', b'"\xff"', b'"F32"', b'"U9"', b'"' + b"a" * 600 + b'"',
)  # fmt: skip
LENGTHS = (0, 1, 2**16, 2**24, 2**24 + 1, 2**40, 2**48 - 1, 2**48, 2**63 - 1, 2**63, 2**64 - 1)
YAML_PARTS = (
    b"&a ", b"*a", b"!!python/object/apply:os.system [true]", b"!!int ", b"<<: *a\n", b"? ",
    b"- ", b": ", b"{", b"}", b"[", b"]", b"|\n  ", b">-\n", b"'", b'"', b"\\", b"\t", b"\n",
    b"\r", b"#", b" #", b"---\n", b"...\n", b"%YAML 1.1\n", b"@", b"`", b"\0", b"\xef\xbb\xbf",
    b"\xff\xfe", b"\xc2\x85", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"\x1b[2J", b'"\\ud800"',
    b'"\\U00110000"', b"'\xf0\x9f\x98\x80'", b"0o777", b"0x1F", b"1e-4", b"1_000", b"12:30:45",
    b".nan", b".inf", b"-.inf", b"9" * 300, b"1e" + b"9" * 50, b"no", b"null", b"~",
    b"2001-01-01", b"[" * 60, b"{a: " * 40, b"- " * 40, b"? [" * 20, b"train:\n  lr: 1\n",
    b"data: ''\n", b"\n\n# why not\n", b"   ",
)  # fmt: skip
CONFIGS = (
    b"model: demo\ndata: photos/\n",
    b"model: {path: demo, clip_skip: 1}\ndata: [{path: photos, repeats: 2}, {path: 'more'}]\n"
    b"output: runs/a\nadapter: {rank: 16, alpha: 8, dropout: 0.1, targets: attn+ff}\n",
    b"# a comment\nmodel: demo\ndata:\n  - path: photos   # another\ntrain:\n  steps: 150\n"
    b"  lr: 3e-3\n  schedule: cosine\n  seed: 0x1F\nsave: {every: 75, trigger_phrase: sks}\n",
    b"model: demo\ndata: photos\nsample:\n  prompts:\n    - 'octopus, painted'\n    - |\n"
    b'      two\n      lines\n  negative: "a \\u00e9\\n"\n  guidance: 3.0\n',
)
FIELDS = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\0\0", b"\0\0\0\1")


def mutated_header(draw: random.Random) -> bytes:
    """A safetensors file of which the header is broken, or is not."""
    header, data = draw.choice(_known_headers() if draw.random() < 0.1 else _headers())
    changed = bytearray(header)
    if draw.random() < 0.3:
        changed, data = _by_grammar(draw)
    if draw.random() < 0.8:
        _apply(draw, changed, [_bytes, _bytes, _slices, _number, _text, _twice])
    length = len(changed) if draw.random() < 0.8 else draw.choice([len(header), *LENGTHS])
    if draw.random() < 0.1:
        data = data[: draw.randrange(len(data) + 1)] + bytes(draw.randrange(3))
    return length.to_bytes(8, "little") + bytes(changed) + data


def mutated_yaml(draw: random.Random) -> bytes:
    """A config of which some is broken, or is not."""
    changed = bytearray(draw.choice(_corpus("yaml") if draw.random() < 0.2 else CONFIGS))
    _apply(draw, changed, [_bytes, _slices, _yaml_part, _yaml_part, _yaml_part, _lines])
    return bytes(changed)


def mutated_image(draw: random.Random) -> bytes:
    """An image file of any format that is read, broken or not."""
    changed = bytearray(draw.choice(_corpus("images") if draw.random() < 0.1 else _images()))
    _apply(draw, changed, [_head, _head, _bytes, _field, _field, _slices, _cut])
    if draw.random() < 0.05:
        other = draw.choice(_images())
        changed += other[draw.randrange(len(other)) :]
    return _with_checksums(changed) if draw.random() < 0.5 else bytes(changed)


# ------------------------------------------------------------------------------- changes of bytes


def _apply(draw: random.Random, content: bytearray, changes: Sequence[Change]) -> None:
    for _ in range(draw.choice([1, 1, 1, 2, 3, 4])):
        draw.choice(changes)(draw, content)


def _place(draw: random.Random, content: bytearray) -> int:
    return draw.randrange(len(content) + 1)


def _bytes(draw: random.Random, content: bytearray, most: int | None = None) -> None:
    """Changes a few bytes, each to any other or by one bit."""
    for _ in range(draw.randint(1, 4) if content else 0):
        at = draw.randrange(min(len(content), most or len(content)))
        content[at] = draw.choice([draw.randrange(256), content[at] ^ 1 << draw.randrange(8)])


def _head(draw: random.Random, content: bytearray) -> None:
    _bytes(draw, content, 200)


def _slices(draw: random.Random, content: bytearray) -> None:
    """Takes a part out, or puts it in once more somewhere else."""
    begin = _place(draw, content)
    part = content[begin : begin + draw.choice([1, 4, 16, 64])]
    if draw.random() < 0.5:
        del content[begin : begin + len(part)]
    else:
        at = _place(draw, content)
        content[at:at] = part


def _cut(draw: random.Random, content: bytearray) -> None:
    del content[_place(draw, content) :]


def _field(draw: random.Random, content: bytearray) -> None:
    """Overwrites four bytes, mostly near the beginning, with a number that few expect."""
    at = draw.randrange(min(len(content), draw.choice([64, 400, 10**6])) or 1)
    content[at : at + 4] = draw.choice(FIELDS)[:: draw.choice([1, -1])]


def _replace(draw: random.Random, content: bytearray, pattern: bytes, by: Sequence[bytes]) -> None:
    """Replaces one of the parts that look like `pattern`."""
    if found := list(re.finditer(pattern, content)):
        begin, end = draw.choice(found).span()
        content[begin:end] = draw.choice(by)


def _number(draw: random.Random, content: bytearray) -> None:
    _replace(draw, content, rb"-?[0-9]+", NUMBERS)


def _text(draw: random.Random, content: bytearray) -> None:
    _replace(draw, content, rb'"[^"]*"', TEXTS)


def _twice(draw: random.Random, content: bytearray) -> None:
    """Says something twice: a whole `"key": value`, or whatever stands between two commas."""
    if found := list(re.finditer(rb'"[^"]*":("[^"]*"|\{[^{}]*\}),?', content)):
        one = draw.choice(found)
        content[one.start() : one.start()] = one[0].rstrip(b",") + b","


def _yaml_part(draw: random.Random, content: bytearray) -> None:
    at = _place(draw, content)
    content[at:at] = draw.choice(YAML_PARTS)


def _lines(draw: random.Random, content: bytearray) -> None:
    """Moves a line, or indents it otherwise."""
    lines = bytes(content).split(b"\n")
    line = lines.pop(draw.randrange(len(lines)))
    line = draw.choice([line, b"  " + line, line.lstrip()])
    lines.insert(draw.randrange(len(lines) + 1), line)
    content[:] = b"\n".join(lines)


# ------------------------------------------------------------------------------- what is changed


@cache
def _corpus(kind: str) -> tuple[bytes, ...]:
    """Inputs that were a problem once, of this program or of a library below it."""
    return tuple(path.read_bytes() for path in sorted((CORPUS / kind).iterdir()))


@cache
def _headers() -> tuple[tuple[bytes, bytes], ...]:
    """Headers and data of whole files."""
    draw = random.Random(0)
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_"
    lora = {
        f"{block}{layer}.{part}": ("F16", shape)
        for layer in "qkv"
        for part, shape in (
            ("alpha", []), ("lora_down.weight", [4, 8]), ("lora_up.weight", [8, 4]),
        )
    }  # fmt: skip
    words = {"ss_network_dim": "4", "ss_tag_frequency": '{"1_cat": {"a cat": 3}}', "é": "\u202e"}
    types = {kind: (kind, [2, 4]) for kind in DTYPE_BITS}
    made = [
        _whole({"one": ("F32", [3, 4]), "two": ("U8", [5])}, None),
        _whole(lora, words),
        _whole(types, {}),
        _whole({"a": ("F32", []), "b": ("F32", [0, 4]), "c": ("BF16", [1] * 8)}, words),
        _whole({}, None),
        *(_by_grammar(draw) for _ in range(3)),
    ]
    return tuple((bytes(text), data) for text, data in made)


def _known_headers() -> Sequence[tuple[bytes, bytes]]:
    return [(content[8:], b"") for content in _corpus("headers")]


def _whole(tensors: dict[str, tuple[str, list[int]]], words: dict[str, str] | None) -> Any:
    """A header that is right, and its data."""
    entries: dict[str, Any] = {} if words is None else {"__metadata__": words}
    end = 0
    for name, (kind, shape) in tensors.items():
        begin, end = end, end + int(np.prod(shape)) * DTYPE_BITS[kind] // 8
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    return bytearray(json.dumps(entries, separators=(",", ":")).encode()), bytes(end)


def _by_grammar(draw: random.Random) -> Any:
    """A header of random tensors, right as it stands; of any order and spacing."""
    kinds = [kind for kind, bits in DTYPE_BITS.items() if bits >= 8]
    names = ["a", "b/../c", "", "\x1b[31m", "\u202e", "x" * 512, "é", "lora_unet_x.alpha", "__x"]
    tensors = {
        draw.choice(names) + str(number) * draw.randrange(2): (
            draw.choice(kinds), [draw.choice([0, 1, 1, 2, 3]) for _ in range(draw.randrange(9))],
        )
        for number in range(draw.randrange(9))
    }  # fmt: skip
    text, data = _whole({n[:512]: t for n, t in tensors.items() if len(n) <= 512}, None)
    entries = list(json.loads(bytes(text)).items())
    draw.shuffle(entries)
    if draw.random() < 0.3:
        entries.append(("__metadata__", draw.choice([{}, {"a": "b"}, {"\x1b": "\0"}])))
    spaced = draw.choice([None, 1, "\t"])
    return bytearray(json.dumps(dict(entries), indent=spaced).encode()), data


@cache
def _images() -> tuple[bytes, ...]:
    """Small images of every format, and of the features that each has a decoder for."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 4), dtype=np.uint8)
    whole, opaque = Image.fromarray(noise), Image.fromarray(noise).convert("RGB")
    indexed = opaque.quantize(16)
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    made: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (opaque, "JPEG", {}),
        (opaque, "JPEG", {"progressive": True}),
        (opaque, "JPEG", {"exif": turned, "restart_marker_rows": 1}),
        (opaque.convert("CMYK"), "JPEG", {}),
        (opaque, "PNG", {}),
        (whole, "PNG", {"exif": turned}),
        (indexed, "PNG", {"transparency": 3}),
        (deep, "PNG", {}),
        (opaque, "WEBP", {"exif": turned}),
        (whole, "WEBP", {"lossless": True}),
        (whole, "WEBP", {"save_all": True, "append_images": [opaque]}),
        (opaque, "AVIF", {"speed": 10}),
        (whole, "AVIF", {"speed": 10, "exif": turned}),
        (opaque, "BMP", {}),
        (indexed, "BMP", {}),
        (opaque, "TIFF", {}),
        (opaque, "TIFF", {"compression": "tiff_lzw"}),
        (opaque, "TIFF", {"compression": "jpeg"}),
        (deep, "TIFF", {"compression": "tiff_deflate"}),
        (indexed, "GIF", {}),
        (indexed, "GIF", {"save_all": True, "append_images": [opaque.quantize(8)], "duration": 9}),
    ]
    return tuple(_encoded(image, kind, options) for image, kind, options in made)


def _encoded(image: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _with_checksums(content: bytearray) -> bytes:
    """The same, with the checksums of a PNG's chunks right: what is behind them is decoded."""
    at = 8
    while content.startswith(b"\x89PNG") and at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4])
        if at + 12 + length > len(content):
            break
        checksum = zlib.crc32(content[at + 4 : at + 8 + length])
        content[at + 8 + length : at + 12 + length] = struct.pack(">I", checksum)
        at += 12 + length
    return bytes(content)

"""Ways in which a file is damaged, each of which leaves a different kind of trace."""

from collections.abc import Callable

__all__ = ["DAMAGE"]


def _header(content: bytes) -> int:
    """Bytes before the data of a safetensors file; of another file, a third."""
    length = int.from_bytes(content[:8], "little")
    return 8 + length if 0 < length < len(content) else len(content) // 3


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


def _zero_tail(content: bytes) -> bytes:
    kept = (_header(content) + len(content)) // 2
    return content[:kept] + bytes(len(content) - kept)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "1 byte": lambda content: content[:1],
    "7 bytes": lambda content: content[:7],
    "8 bytes": lambda content: content[:8],
    "cut in the header": lambda content: content[: _header(content) // 2],
    "cut before the header's last byte": lambda content: content[: _header(content) - 1],
    "the header alone": lambda content: content[: _header(content)],
    "cut in the data": lambda content: content[: (_header(content) + len(content)) // 2],
    "one byte less": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\0",
    "zeros at the end": _zero_tail,
    "data of zeros": lambda content: content[: _header(content)].ljust(len(content), b"\0"),
    "one bit of the data": lambda content: _flipped(
        content, (_header(content) + len(content)) // 2
    ),
    "one bit of the header": lambda content: _flipped(content, 12),
    "zeros": lambda content: bytes(len(content)),
}
"""A file's bytes to damaged ones, by what is wrong with them."""

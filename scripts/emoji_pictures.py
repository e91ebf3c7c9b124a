"""The emoji of Noto Color Emoji as pictures with names: what the demo model and data are made from.

    python scripts/emoji_pictures.py emoji.npz

Needs the font (Debian: fonts-noto-color-emoji). One emoji is one codepoint that has a name in
Python's Unicode tables and a picture in the font; keycap bases and bare skin tones are left out.
"""

import struct
import unicodedata
from pathlib import Path

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont

SIZE = 128
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
POINTS, GLYPH = 109, (136, 128)  # the font's only bitmap strike and its size in pixels
MARGIN = 4  # pixels left and right of the glyph
KEYCAP_BASES = range(0x80)
SKIN_TONES = range(0x1F3FB, 0x1F400)


def font_codepoints(font: bytes) -> set[int]:
    """The codepoints of the font's segmented-coverage character map (OpenType cmap format 12)."""
    tables = {}
    for index in range(struct.unpack_from(">H", font, 4)[0]):
        tag, _, offset, _ = struct.unpack_from(">4sIII", font, 12 + 16 * index)
        tables[tag] = offset
    cmap = tables[b"cmap"]
    points: set[int] = set()
    for index in range(struct.unpack_from(">H", font, cmap + 2)[0]):
        start = cmap + struct.unpack_from(">HHI", font, cmap + 4 + 8 * index)[2]
        if struct.unpack_from(">H", font, start)[0] != 12:
            continue
        for group in range(struct.unpack_from(">I", font, start + 12)[0]):
            first, last, _ = struct.unpack_from(">III", font, start + 16 + 12 * group)
            points.update(range(first, last + 1))
    return points


def draw_emoji(codepoint: int, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """One emoji in the middle of a transparent square: RGBA uint8 [128, 128, 4]."""
    glyph = Image.new("RGBA", GLYPH)
    ImageDraw.Draw(glyph).text((0, 0), chr(codepoint), font=font, embedded_color=True)
    width = SIZE - 2 * MARGIN
    height = round(width * GLYPH[1] / GLYPH[0])
    square = Image.new("RGBA", (SIZE, SIZE))
    square.paste(
        glyph.resize((width, height), Image.Resampling.LANCZOS), (MARGIN, (SIZE - height) // 2)
    )
    return np.asarray(square)


def draw_all() -> dict[str, np.ndarray]:
    """Every emoji by its name in lower case, in the order of codepoints, each look once."""
    font = ImageFont.truetype(str(FONT), POINTS)
    emoji: dict[str, np.ndarray] = {}
    seen = set()
    for point in sorted(font_codepoints(FONT.read_bytes())):
        name = unicodedata.name(chr(point), "").lower()
        if not name or point in KEYCAP_BASES or point in SKIN_TONES:
            continue
        picture = draw_emoji(point, font)
        if picture[..., 3].any() and picture.tobytes() not in seen:
            seen.add(picture.tobytes())
            emoji[name] = picture
    return emoji


def main(archive: Path) -> None:
    """Write the names and the RGBA pictures [N, 128, 128, 4] of all emoji to an .npz."""
    emoji = draw_all()
    np.savez_compressed(archive, names=np.array(list(emoji)), pictures=np.stack([*emoji.values()]))
    print(f"{len(emoji)} emoji, {archive.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    typer.run(main)

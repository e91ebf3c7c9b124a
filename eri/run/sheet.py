"""A contact sheet: rows of pictures with titles, and a caption under each column."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

__all__ = ["contact_sheet"]

TILE = 256  # pixels; smaller pictures are enlarged to this for looking at
MARGIN = 16
LINE = 22  # pixels of a line of text
CAPTION_LINES = 3

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], captions: Sequence[str]
) -> Image.Image:
    """Put rows of pictures on one sheet, each row with its title, each column with its caption.

    Args:
        rows: title and pictures; the last row's pictures get the captions.
        captions: one for each picture of the last row.
    """
    font = ImageFont.load_default(size=16)
    tile = max(TILE, *(side for _, row in rows for picture in row for side in picture.size))
    columns = max(len(row) for _, row in rows)
    wrapped = [_wrap(caption, font, tile) for caption in captions]
    text_lines = max((len(lines) for lines in wrapped), default=0)
    width = MARGIN + columns * (tile + MARGIN)
    height = MARGIN + len(rows) * (LINE + tile + MARGIN) + text_lines * LINE
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for title, row in rows:
        draw.text((MARGIN, top), title, fill="black", font=font)
        for column, picture in enumerate(row):
            left = MARGIN + column * (tile + MARGIN)
            sheet.paste(_fitted(picture, tile), (left, top + LINE))
        top += LINE + tile + MARGIN
    for column, lines in enumerate(wrapped):
        left = MARGIN + column * (tile + MARGIN)
        draw.multiline_text((left, top - MARGIN // 2), "\n".join(lines), fill="black", font=font)
    return sheet


def _fitted(picture: Image.Image, tile: int) -> Image.Image:
    """Scale a picture so that its longer side fills the tile, and centre it."""
    scale = tile / max(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    square = Image.new("RGB", (tile, tile), "white")
    scaled = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    square.paste(scaled, ((tile - size[0]) // 2, (tile - size[1]) // 2))
    return square


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """Break a caption into lines of a width in pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > CAPTION_LINES:
        return [*lines[: CAPTION_LINES - 1], f"{lines[CAPTION_LINES - 1]} …"]
    return lines

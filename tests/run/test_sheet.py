from PIL import Image

from eri.run.sheet import LINE, MARGIN, TILE, contact_sheet

RED, BLUE = (250, 0, 0), (0, 0, 250)


def test_every_picture_stands_in_its_row_and_column() -> None:
    reds = [Image.new("RGB", (64, 64), RED)] * 2
    blues = [Image.new("RGB", (64, 32), BLUE)] * 3
    sheet = contact_sheet([("red", reds), ("blue", blues)], ["one", "two", "three"])
    assert sheet.width == MARGIN + 3 * (TILE + MARGIN)

    def at(row: int, column: int) -> tuple[int, ...]:
        left = MARGIN + column * (TILE + MARGIN) + TILE // 2
        top = MARGIN + row * (LINE + TILE + MARGIN) + LINE + TILE // 2
        pixel = sheet.getpixel((left, top))
        assert isinstance(pixel, tuple)
        return pixel

    assert [at(0, column) for column in range(3)] == [RED, RED, (255, 255, 255)]
    assert [at(1, column) for column in range(3)] == [BLUE] * 3


def test_long_captions_are_broken_into_a_few_lines() -> None:
    picture = [Image.new("RGB", (64, 64), RED)]
    one = contact_sheet([("", picture)], ["short"])
    many = contact_sheet([("", picture)], ["long words " * 40])
    assert one.height < many.height <= one.height + 2 * LINE


def test_large_pictures_keep_their_size() -> None:
    sheet = contact_sheet([("", [Image.new("RGB", (512, 512), RED)])], [""])
    assert sheet.width == 2 * MARGIN + 512

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eri.config import DataSource
from eri.data.checked import Checks
from eri.data.checking import Checked, Task, check
from eri.data.items import Item, Mask
from eri.data.listing import list_folder
from eri.files import sha256


def image(path: Path, mode: str = "RGB", size: tuple[int, int] = (80, 64)) -> Path:
    Image.new(mode, size).save(path)
    path.with_suffix(".txt").write_text("a fox")
    return path


def look(folder: Path, **settings: Any) -> Checked:
    """What comes of the one image of a folder."""
    (candidate,) = list_folder(folder).candidates
    source = DataSource(path=folder, **settings)
    with Checks() as checks:
        return check(Task(candidate=candidate, rows=(), source=source, index=3), checks)


def told(checked: Checked) -> list[str]:
    assert checked.item is None
    return [f"{fault.path.name}: {fault.what}" for fault in checked.faults]


def test_an_item_is_all_that_is_known(tmp_path: Path) -> None:
    path = image(tmp_path / "a.png")
    assert look(tmp_path) == Checked(
        item=Item(
            path=path, captions=("a fox",), width=80, height=64, sha256=sha256(path), source=3
        ),
        origin=".txt",
    )


def test_all_that_is_wrong_with_one_image_is_told(tmp_path: Path) -> None:
    image(tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "a.json").write_bytes(b"{")
    assert [line.split(":")[0] for line in told(look(tmp_path))] == ["a.json", "a.txt", "a.png"]


def test_a_bad_mask_and_a_missing_caption_are_both_told(tmp_path: Path) -> None:
    image(tmp_path / "a.png").with_suffix(".txt").unlink()
    Image.new("L", (80, 64), 0).save(tmp_path / "a.mask.png")
    faults = look(tmp_path, mask="file").faults
    assert [(fault.path.name, fault.skippable) for fault in faults] == [
        ("a.mask.png", True),
        ("a.png", False),
    ]


def test_what_cannot_be_read_needs_no_caption(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (line,) = told(look(tmp_path))
    assert "the file is empty" in line


@pytest.mark.parametrize(("alpha", "background"), [(255, None), (128, "#102030")])
def test_a_background_belongs_to_transparent_images_only(
    tmp_path: Path, alpha: int, background: str | None
) -> None:
    picture = Image.new("RGBA", (80, 64), (9, 9, 9, alpha))
    picture.save(image(tmp_path / "a.png"))
    checked = look(tmp_path, background="#102030")
    assert checked.item is not None
    assert checked.item.background == background
    remark = ("transparent images, laid on #102030", tmp_path / "a.png")
    assert checked.remarks == ([remark] if background else [])


# masks


def masked(folder: Path, **settings: Any) -> tuple[Mask | None, list[str]]:
    checked = look(folder, **settings)
    assert checked.item is not None
    return checked.item.mask, [text for text, _ in checked.remarks]


def test_a_mask_file(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    path = tmp_path / "a-masklabel.png"
    Image.new("L", (80, 64), 9).save(path)
    expected = Mask(path=path, sha256=sha256(path), alpha=False)
    assert masked(tmp_path, mask="file") == (expected, [])
    unused = "mask files are here and mask: is {}, so they are not used"
    assert masked(tmp_path, mask="none") == (None, [unused.format("none")])
    remarks = [unused.format("alpha"), "images without transparency, learned whole"]
    assert masked(tmp_path, mask="alpha") == (None, remarks)


def test_no_mask_file(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    assert masked(tmp_path, mask="file") == (None, ["images without a mask, learned whole"])


def test_two_mask_files(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    for ending in ("-masklabel.png", ".mask.png"):
        Image.new("L", (80, 64), 9).save(tmp_path / f"a{ending}")
    assert told(look(tmp_path, mask="file")) == [
        "a.png: two masks, a-masklabel.png and a.mask.png; keep one"
    ]


def test_transparency_as_a_mask(tmp_path: Path) -> None:
    path = image(tmp_path / "a.png")
    Image.new("RGBA", (80, 64), (9, 9, 9, 128)).save(path)
    mask, _ = masked(tmp_path, mask="alpha")
    assert mask == Mask(path=path, sha256=sha256(path), alpha=True)
    Image.new("RGBA", (80, 64), (9, 9, 9, 0)).save(path)
    (line,) = told(look(tmp_path, mask="alpha"))
    assert "all of it is transparent, so nothing would be learned" in line


def test_a_mask_that_is_wrong_is_told_only_where_it_is_used(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    Image.new("L", (64, 80), 9).save(tmp_path / "a-masklabel.png")
    (line,) = told(look(tmp_path, mask="file"))
    assert line.startswith("a-masklabel.png: the mask has 64 x 80 pixels and its image 80 x 64; ")
    assert masked(tmp_path, mask="none")[0] is None

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eri.config import DataSource
from eri.data.folder import Dataset, scan
from eri.errors import DataError


def image(path: Path, size: tuple[int, int] = (40, 20), caption: str | None = "a fox") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = sum(path.name.encode()) % 256
    Image.new("RGB", size, (colour, 0, 0)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def check(path: Path, **settings: Any) -> Dataset:
    return scan([DataSource(path=path, **settings)])


def refused(path: Path, **settings: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        check(path, **settings)
    assert caught.value.exit_code == 3
    return caught.value


def test_a_good_folder_becomes_items(tmp_path: Path) -> None:
    image(tmp_path / "b.png", caption="a red fox\n")
    image(tmp_path / "sub" / "a.png", (30, 50))
    dataset = check(tmp_path)
    assert [(item.path.name, item.captions[0]) for item in dataset.items] == [
        ("b.png", "a red fox"),
        ("a.png", "a fox"),
    ]
    assert [(item.width, item.height) for item in dataset.items] == [(40, 20), (30, 50)]
    assert [item.source for item in dataset.items] == [0, 0]
    assert dataset.skipped == ()
    assert dataset.notes == ()


def test_sizes_are_those_of_the_upright_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "a.txt").write_text("x")
    item = check(tmp_path).items[0]
    assert (item.width, item.height) == (20, 40)


def test_sources_follow_each_other(tmp_path: Path) -> None:
    image(tmp_path / "one" / "b.png")
    image(tmp_path / "two" / "a.png", caption=None)
    sources = [
        DataSource(path=tmp_path / "one"),
        DataSource(path=tmp_path / "two", missing_caption="filename"),
    ]
    items = scan(sources).items
    assert [(item.path.name, item.source, item.captions[0]) for item in items] == [
        ("b.png", 0, "a fox"),
        ("a.png", 1, "a"),
    ]


def test_progress_counts_every_file(tmp_path: Path) -> None:
    for n in range(5):
        image(tmp_path / f"{n}.png")
    seen: list[tuple[int, int]] = []
    scan([DataSource(path=tmp_path)], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 5) for n in range(1, 6)]


def bad_folder(folder: Path) -> Path:
    image(folder / "good.png")
    image(folder / "no-caption.png", caption=None)
    image(folder / "empty-caption.png", caption=" \n")
    image(folder / "utf16.png").with_suffix(".txt").write_bytes("fox".encode("utf-16"))
    image(folder / "two.png").with_suffix(".caption").write_text("a cat")
    image(folder / "same.png").with_suffix(".caption").write_text("a fox\n")
    cut = image(folder / "cut.png", (400, 400))
    cut.write_bytes(cut.read_bytes()[:200])
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.jpg").write_bytes(b"hello")
    (folder / "page.jpg").write_bytes(b"<!doctype html>")
    (folder / "phone.heic").write_bytes(b"x")
    os.mkfifo(folder / "pipe.png")
    (folder / "dangling.png").symlink_to("nowhere")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "folder.png").mkdir()
    (folder / "esc\x1b[2J.png").write_bytes(b"x")
    Path(os.fsdecode(os.fsencode(folder) + b"/latin-\xe9.png")).write_bytes(b"x")
    Image.new("1", (10_001, 10_001)).save(folder / "bomb.png")
    return folder


BAD_FILES = {
    "utf16.txt": "UTF-16",
    "two.png": "two different captions",
    "cut.png": "damaged",
    "zero.png": "empty",
    "text.jpg": "not an image of a known format",
    "page.jpg": "web page",
    "phone.heic": "not read",
    "pipe.png": "not a regular file",
    "dangling.png": "a link to 'nowhere'",
    "circle.png": "in a circle",
    "esc\\x1b[2J.png": "not an image",
    "latin-\\udce9.png": "not an image",
    "bomb.png": "million pixels",
}
NO_CAPTION = {"no-caption.png": "no caption", "empty-caption.png": "no caption"}


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    error = refused(bad_folder(tmp_path))
    expected = BAD_FILES | NO_CAPTION
    told = [problem for problem in error.problems if not problem.startswith("note: ")]
    assert len(told) == len(expected)
    for name, words in expected.items():
        (line,) = [problem for problem in told if f"/{name}: " in problem]
        assert words in line
    assert all(problem.isprintable() for problem in error.problems)
    assert error.what == "15 of 17 images cannot be used"
    assert error.where == str(tmp_path)
    assert error.hint


def test_bad_files_can_be_skipped(tmp_path: Path) -> None:
    dataset = check(bad_folder(tmp_path), on_bad="skip", missing_caption="empty")
    assert {item.path.name: item.captions[0] for item in dataset.items} == {
        "empty-caption.png": "",
        "good.png": "a fox",
        "no-caption.png": "",
        "same.png": "a fox",
    }
    assert len(dataset.skipped) == len(BAD_FILES)


def test_a_missing_caption_is_not_a_bad_file(tmp_path: Path) -> None:
    image(tmp_path / "a.png", caption=None)
    image(tmp_path / "b.png")
    error = refused(tmp_path, on_bad="skip")
    assert [line.split(": ")[1] for line in error.problems] == [
        "no caption; expected a.txt beside it"
    ]


def test_a_name_can_stand_for_a_caption(tmp_path: Path) -> None:
    image(tmp_path / "a_red_fox.png", caption=None)
    image(tmp_path / "b.png", caption="")
    items = check(tmp_path, missing_caption="filename").items
    assert [item.captions[0] for item in items] == ["a red fox", "b"]


def test_captions_in_a_file_that_is_not_read_are_pointed_out(tmp_path: Path) -> None:
    image(tmp_path / "a.png", caption=None)
    (tmp_path / "metadata.jsonl").write_text("{}")
    assert "metadata.jsonl" in refused(tmp_path).problems[-1]


def test_a_folder_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    assert "no image is left" in refused(tmp_path, on_bad="skip").what


def test_folders_that_cannot_be_used_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    image(tmp_path / "good" / "a.png")
    with pytest.raises(DataError) as caught:
        scan([DataSource(path=tmp_path / name) for name in ("none", "good", "empty")])
    assert caught.value.what == "2 of 3 folders cannot be used"
    assert [problem.split(" (")[0] for problem in caught.value.problems] == [
        "no such folder",
        "no image in this folder",
    ]


def test_equal_files_are_pointed_out(tmp_path: Path) -> None:
    content = image(tmp_path / "a.png").read_bytes()
    image(tmp_path / "b.png").write_bytes(content)
    assert check(tmp_path).notes == (
        f"the same file twice: {tmp_path / 'a.png'} and {tmp_path / 'b.png'}",
    )


def test_the_fingerprint_is_of_bytes_captions_and_order(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    image(tmp_path / "b.png")
    first = check(tmp_path).fingerprint
    os.utime(tmp_path / "a.png", (1, 1))
    assert check(tmp_path).fingerprint == first
    (tmp_path / "a.txt").write_text("a cat")
    second = check(tmp_path).fingerprint
    assert second != first
    image(tmp_path / "a.png", (41, 20), caption="a cat")
    assert check(tmp_path).fingerprint not in {first, second}


def test_an_interrupted_check_leaves_no_threads(tmp_path: Path) -> None:
    for n in range(20):
        image(tmp_path / f"{n:02}.png")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan([DataSource(path=tmp_path)], progress=interrupt)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("check")]

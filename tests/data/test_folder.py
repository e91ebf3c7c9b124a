import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eri.config import DataSource
from eri.data import folder
from eri.data.folder import scan
from eri.data.items import Dataset
from eri.errors import DataError


def image(path: Path, size: tuple[int, int] = (80, 64), caption: str | None = "a fox") -> Path:
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
    image(tmp_path / "sub" / "a.png", (70, 90))
    dataset = check(tmp_path)
    assert [(item.path.name, item.captions[0]) for item in dataset.items] == [
        ("b.png", "a red fox"),
        ("a.png", "a fox"),
    ]
    assert [(item.width, item.height) for item in dataset.items] == [(80, 64), (70, 90)]
    assert [item.source for item in dataset.items] == [0, 0]
    assert dataset.skipped == ()
    assert dataset.notes == ("captions: 2 from .txt",)


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


def test_a_name_can_stand_for_a_caption(tmp_path: Path) -> None:
    image(tmp_path / "a_red_fox.png", caption=None)
    image(tmp_path / "b.png", caption="")
    items = check(tmp_path, missing_caption="filename").items
    assert [item.captions[0] for item in items] == ["a red fox", "b"]


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
    assert check(tmp_path).notes[-1] == (
        f"the same image twice (1): {tmp_path / 'a.png'} and {tmp_path / 'b.png'}"
    )


def test_equal_files_of_two_folders_are_pointed_out(tmp_path: Path) -> None:
    image(tmp_path / "one" / "a.png")
    image(tmp_path / "two" / "a.png")
    both = [DataSource(path=tmp_path / name) for name in ("one", "two")]
    assert scan(both).notes[-1].startswith("the same image twice (1): ")
    assert scan([both[0], both[0]]).notes == (  # on purpose, as for two resolutions
        f"captions in {tmp_path / 'one'}: 1 from .txt",
        f"captions in {tmp_path / 'one'}: 1 from .txt",
    )


def test_an_interrupted_check_leaves_no_threads(tmp_path: Path) -> None:
    for n in range(20):
        image(tmp_path / f"{n:02}.png")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan([DataSource(path=tmp_path)], progress=interrupt)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_captions_of_a_table_reach_its_folder_and_those_below(tmp_path: Path) -> None:
    image(tmp_path / "a.png", caption=None)
    image(tmp_path / "sub" / "b.png", caption=None)
    image(tmp_path / "sub" / "c.png", caption=None)
    image(tmp_path / "d.png")
    table(tmp_path, {"a.png": "a fox", "sub/b.png": ["a cat", "a red cat"], "gone.png": "?"})
    (tmp_path / "sub" / "metadata.csv").write_text("file_name,caption\nc.png,a dog\n")
    dataset = check(tmp_path)
    assert {item.path.name: item.captions for item in dataset.items} == {
        "a.png": ("a fox",),
        "b.png": ("a cat", "a red cat"),
        "c.png": ("a dog",),
        "d.png": ("a fox",),
    }
    gone = f"{tmp_path / 'metadata.jsonl'}:3 names gone.png"
    assert dataset.notes == (
        "captions: 1 from .txt, 2 from metadata.jsonl, 1 from metadata.csv",
        f"rows that name no image of the folder (1): {gone}",
    )


def table(folder: Path, captions: dict[str, Any]) -> None:
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(rows))


def test_one_text_in_two_places_is_one_caption_and_two_texts_are_a_fault(tmp_path: Path) -> None:
    image(tmp_path / "a.png", caption="a fox")
    table(tmp_path, {"a.png": "a fox"})
    assert check(tmp_path).items[0].captions == ("a fox",)
    table(tmp_path, {"a.png": "a cat"})
    error = refused(tmp_path)
    what = "different captions in a.txt, metadata.jsonl:1; keep one"
    assert error.problems[0] == f"{tmp_path / 'a.png'}: {what}"


def test_tables_that_say_nothing_are_named(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "objects": []}')
    named = tmp_path / "metadata.jsonl"
    assert check(tmp_path).notes[-1] == f"tables without a caption (1): {named}"


def test_what_cannot_be_used_is_counted_as_what_it_is(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for n in range(4):
        image(one / f"{n}.png")
    for n in range(3):
        (one / f"bad-{n}.png").write_bytes(b"x")
    image(two / "a.png")
    (two / "metadata.csv").write_text("name,text\na.png,a fox\n")
    sources = [DataSource(path=one, on_bad="skip"), DataSource(path=two)]
    error = refused_of(sources)
    assert (error.what, error.where) == ("1 caption table cannot be used", str(two))
    assert [line for line in error.problems if not line.startswith("note: ")] == [
        f"{two / 'metadata.csv'}:1: no column 'file_name' in its first line ('name', 'text'); "
        "add it"
    ]
    (two / "b.HEIC").write_bytes(b"x")
    (two / "metadata.jsonl").write_text("{")
    told = "1 of 9 images, 1 row of a caption table and 1 caption table cannot be used"
    assert refused_of(sources).what == told
    assert refused_of([*sources, sources[1]]).what == told  # files that two sources share


def refused_of(sources: list[DataSource]) -> DataError:
    with pytest.raises(DataError) as caught:
        scan(sources)
    return caught.value


def test_a_single_image_is_counted_as_one(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    assert refused(tmp_path).what == "1 of 1 image cannot be used"


def test_every_folder_that_is_left_empty_is_told(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        image(tmp_path / name / f"{name}.png").write_bytes(b"x")
    image(tmp_path / "three" / "good.png")
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    skipping = [DataSource(path=path, on_bad="skip") for path in (one, two, three)]
    error = refused_of(skipping)
    left = "no image is left; every one was skipped"
    assert (error.what, error.where) == (left, f"{one}, {two}")
    heads = [line.split("; ")[0].split(" (")[0] for line in error.problems]
    unread = "not an image of a known format"
    assert heads == [
        f"{one}: no image is left",
        f"{one / 'one.png'}: {unread}",
        f"{two}: no image is left",
        f"{two / 'two.png'}: {unread}",
    ]
    error = refused_of([skipping[0], DataSource(path=three)])  # beside what may not be skipped
    assert (error.what, error.where) == ("1 of 3 images cannot be used", f"{one}, {three}")
    assert f"{one}: {left}" in error.problems


def test_a_jpeg_is_read_whatever_kind_its_name_tells_of(tmp_path: Path) -> None:
    Image.new("RGB", (80, 64)).save(tmp_path / "IMG_1.HEIC", "JPEG")
    (tmp_path / "IMG_1.txt").write_text("a fox")
    (item,) = check(tmp_path).items
    assert (item.path.name, item.width, item.captions) == ("IMG_1.HEIC", 80, ("a fox",))
    content = item.path.read_bytes()
    item.path.write_bytes(content[:-20])
    (line, *_) = refused(tmp_path).problems
    assert line.startswith(f"{item.path}: damaged: ")


def test_bad_rows_alone_are_told_as_rows(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text("{\n[]\n")
    error = refused(tmp_path)
    assert error.what == "2 rows of caption tables cannot be used"
    assert len([line for line in error.problems if ".jsonl:" in line]) == 2
    skipping = check(tmp_path, on_bad="skip")
    assert (len(skipping.items), len(skipping.skipped)) == (1, 2)


def test_a_bad_caption_that_two_images_share_is_told_once(tmp_path: Path) -> None:
    image(tmp_path / "a.png").with_suffix(".txt").write_bytes(b"\xff")
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg")
    error = refused(tmp_path)
    assert error.what == "2 of 2 images cannot be used"
    assert len(error.problems) == 1


def test_a_second_look_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(4):
        image(tmp_path / f"{n}.png")
    mask(tmp_path / "0-masklabel.png", (80, 64))
    first = check(tmp_path, mask="file")
    opened = counted(monkeypatch)
    os.utime(tmp_path / "0.png", (1, 1))
    assert check(tmp_path, mask="file") == first
    assert opened == []
    Image.new("RGB", (50, 60)).save(tmp_path / "1.png")
    assert (check(tmp_path, mask="file").items[1].height, len(opened)) == (60, 1)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A list to which every image that is opened is added."""
    opened: list[object] = []
    really = Image.open

    def counting(file: Any, *rest: Any, **options: Any) -> Image.Image:
        opened.append(file)
        return really(file, *rest, **options)

    monkeypatch.setattr(Image, "open", counting)
    return opened


def mask(path: Path, size: tuple[int, int], brightness: int = 255) -> None:
    Image.new("L", size, brightness).save(path)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_what_a_killed_check_knew_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(200):
        image(tmp_path / f"{n:03}.png", (40, 20 + n))

    def die(done: int, total: int) -> None:
        if done == 100:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        scan([DataSource(path=tmp_path)], progress=die)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    opened = counted(monkeypatch)
    assert [item.height for item in check(tmp_path).items] == [20 + n for n in range(200)]
    assert len(opened) <= 100


def test_bad_files_are_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    refused(tmp_path)
    opened = counted(monkeypatch)
    refused(tmp_path)
    assert len(opened) == 1


def test_the_limit_on_pixels_is_that_of_the_source(tmp_path: Path) -> None:
    image(tmp_path / "a.png", (1001, 1000))
    assert check(tmp_path, max_megapixels=2).items[0].width == 1001
    error = refused(tmp_path, max_megapixels=1)  # though it was decoded before
    assert "1001 x 1000 are more than 1 million pixels" in error.problems[0]


def test_few_files_wait_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(200):
        image(tmp_path / f"{n:03}.png")
    waiting: list[int] = []
    submitted: list[object] = []
    submit = ThreadPoolExecutor.submit

    def counting(self: ThreadPoolExecutor, *call: Any) -> Any:
        submitted.append(call)
        return submit(self, *call)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", counting)
    source = DataSource(path=tmp_path)
    scan([source], progress=lambda done, total: waiting.append(len(submitted) - done))
    assert max(waiting) <= folder.MAX_THREADS * folder.AHEAD

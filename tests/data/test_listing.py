import os
from pathlib import Path

import pytest

from eri.data.listing import list_folder, note
from eri.errors import DataError


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def test_images_are_found_with_their_captions_in_a_fixed_order(tmp_path: Path) -> None:
    touch(tmp_path, "b.PNG", "b.txt", "a.jpeg", "sub/c.webp", "sub/c.caption", "a.b.gif", "a.b.TXT")
    found = {
        str(candidate.path.relative_to(tmp_path)): [path.name for path in candidate.captions]
        for candidate in list_folder(tmp_path).candidates
    }
    assert found == {
        "a.b.gif": ["a.b.TXT"],
        "a.jpeg": [],
        "b.PNG": ["b.txt"],
        "sub/c.webp": ["c.caption"],
    }
    assert list(found) == ["a.b.gif", "a.jpeg", "b.PNG", "sub/c.webp"]


def test_twins_share_a_caption(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "a.png", "a.txt")
    listing = list_folder(tmp_path)
    assert [len(candidate.captions) for candidate in listing.candidates] == [1, 1]
    assert listing.notes == []


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "._a.png", ".hidden/b.png", ".DS_Store")
    listing = list_folder(tmp_path)
    assert [candidate.path.name for candidate in listing.candidates] == ["a.png"]
    assert listing.notes == []


def test_runs_are_not_searched(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "runs/b.png")
    for run in ("runs/a", "lora"):
        touch(tmp_path, f"{run}/run.lock", f"{run}/samples/000000-1.png")
    listing = list_folder(tmp_path)
    assert [candidate.path.name for candidate in listing.candidates] == ["a.png", "b.png"]
    told = f"folders of runs, not searched (2): {tmp_path / 'lora'}, {tmp_path / 'runs/a'}"
    assert listing.notes == [told]
    assert len(list_folder(tmp_path / "lora").candidates) == 1  # asked for by name


def test_what_is_not_used_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.txt", "read.me", "info.json", "d.heic", "e.CR2")
    listing = list_folder(tmp_path)
    assert listing.notes == [
        f"captions without an image (1): {tmp_path / 'b.txt'}",
        f"files that are neither images nor captions, not read (2): {tmp_path / 'read.me'}, "
        f"{tmp_path / 'info.json'}",
    ]
    assert [fault.path for fault in listing.refused] == [tmp_path / "d.heic", tmp_path / "e.CR2"]


def test_tables_are_found_in_every_folder(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "metadata.csv", "sub/metadata.jsonl", "sub/other.csv")
    listing = list_folder(tmp_path)
    assert listing.tables == [tmp_path / "metadata.csv", tmp_path / "sub" / "metadata.jsonl"]
    assert len(listing.notes) == 1


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.caption", "a.json", "a.png.txt"])
def test_names_of_captions(tmp_path: Path, name: str) -> None:
    (candidate,) = list_folder(touch(tmp_path, "a.png", name)).candidates
    assert [path.name for path in candidate.captions] == [name]


@pytest.mark.parametrize("name", ["a-masklabel.png", "a.mask.png", "a-maskLabel.PNG"])
def test_masks_are_no_images(tmp_path: Path, name: str) -> None:
    (candidate,) = list_folder(touch(tmp_path, "a.jpg", name)).candidates
    assert [path.name for path in candidate.masks] == [name]
    assert candidate.path.name == "a.jpg"


@pytest.mark.parametrize("ending", ["-masklabel", ".mask"])
def test_what_is_named_like_a_mask_of_no_image_is_an_image(tmp_path: Path, ending: str) -> None:
    name = f"gas{ending}.png"
    listing = list_folder(touch(tmp_path, "a.png", name, f"gas{ending}.txt", "sub/gas.png"))
    found = {candidate.path.name: candidate for candidate in listing.candidates}
    assert list(found) == ["a.png", name, "gas.png"]
    assert [path.name for path in found[name].captions] == [f"gas{ending}.txt"]
    assert listing.notes == [
        f"named like the mask of an image that is not here, so an image (1): {tmp_path / name}"
    ]


def test_an_image_that_is_named_like_a_mask_has_a_mask(tmp_path: Path) -> None:
    names = ("gas.mask.png", "gas.mask-masklabel.png", "gas.mask.mask.png")
    (candidate,) = list_folder(touch(tmp_path, *names)).candidates
    assert candidate.path.name == "gas.mask.png"
    assert {path.name for path in candidate.masks} == set(names[1:])


def test_a_mask_of_a_mask_is_no_mask(tmp_path: Path) -> None:
    listing = list_folder(touch(tmp_path, "a.png", "a.mask.png", "a.mask.mask.png"))
    assert [candidate.path.name for candidate in listing.candidates] == ["a.mask.mask.png", "a.png"]
    assert [path.name for path in listing.candidates[1].masks] == ["a.mask.png"]


def test_the_mask_of_a_refused_image_is_no_image(tmp_path: Path) -> None:
    listing = list_folder(touch(tmp_path, "a.heic", "a.mask.png"))
    assert (listing.candidates, listing.notes) == ([], [])


def test_a_name_that_is_nothing_but_the_ending_of_a_mask_is_an_image(tmp_path: Path) -> None:
    listing = list_folder(touch(tmp_path, "sub.png", "sub/-masklabel.png"))
    assert [candidate.masks for candidate in listing.candidates] == [(), ()]


HEADS = {
    "JPEG": b"\xff\xd8\xff\xe0",
    "PNG": b"\x89PNG\r\n",
    "WEBP": b"RIFF\0\0\0\0WEBP",
    "GIF": b"GIF89a",
    "BMP": b"BM\1\2\3\4\0\0\0\0",
    "AVIF": b"\0\0\0\x1cftypavif",
    "TIFF": b"MM\0*",
}


@pytest.mark.parametrize("kind", HEADS)
def test_an_image_that_is_named_as_another_kind_is_an_image(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.HEIC").write_bytes(HEADS[kind])
    listing = list_folder(touch(tmp_path, "a.txt"))
    ((path, captions),) = [(found.path, found.captions) for found in listing.candidates]
    assert (path, captions) == (tmp_path / "a.HEIC", (tmp_path / "a.txt",))
    assert listing.refused == []


def test_of_a_raw_photo_the_thumbnail_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.nef").write_bytes(HEADS["TIFF"])
    (tmp_path / "b.nef").write_bytes(HEADS["JPEG"])
    listing = list_folder(tmp_path)
    assert [fault.path.name for fault in listing.refused] == ["a.nef"]
    assert [candidate.path.name for candidate in listing.candidates] == ["b.nef"]


def test_what_is_named_as_another_kind_and_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.heic")
    (fault,) = list_folder(tmp_path).refused
    assert str(fault) == f"{tmp_path / 'a.heic'}: not a regular file; remove it"


def test_a_caption_in_another_unicode_form_belongs_to_its_image(tmp_path: Path) -> None:
    composed, split = "caf\u00e9", "cafe\u0301"
    (candidate,) = list_folder(touch(tmp_path, f"{composed}.png", f"{split}.txt")).candidates
    assert [path.name for path in candidate.captions] == [f"{split}.txt"]


def test_twins_in_two_unicode_forms_keep_their_own_captions(tmp_path: Path) -> None:
    composed, split = "caf\u00e9", "cafe\u0301"
    names = [f"{stem}{suffix}" for stem in (composed, split) for suffix in (".png", ".txt")]
    listing = list_folder(touch(tmp_path, *names))
    for candidate in listing.candidates:
        assert candidate.captions == (candidate.path.with_suffix(".txt"),)
    assert listing.notes == [
        "names that differ in nothing but their Unicode form (1): "
        r"'cafe\u0301.png' and 'caf\xe9.png'"
    ]


def test_the_caption_of_a_refused_image_is_not_an_orphan(tmp_path: Path) -> None:
    assert list_folder(touch(tmp_path, "a.heic", "a.txt")).notes == []


def test_a_folder_named_like_an_image_is_searched(tmp_path: Path) -> None:
    listing = list_folder(touch(tmp_path, "b.png/a.png"))
    assert [candidate.path for candidate in listing.candidates] == [tmp_path / "b.png" / "a.png"]
    named = tmp_path / "b.png"
    assert listing.notes == [f"folders named like images, searched as folders (1): {named}"]


def test_links_to_folders_are_not_followed_and_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "circle").symlink_to(tmp_path)
    listing = list_folder(tmp_path)
    assert len(listing.candidates) == 1
    assert listing.notes == [f"links to folders, not followed (1): {tmp_path / 'circle'}"]


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    touch(tmp_path, "real/a.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert len(list_folder(tmp_path / "link").candidates) == 1


def test_links_to_images_are_images(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/a.png", "data/b.txt")
    (tmp_path / "data" / "b.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    assert len(list_folder(tmp_path / "data").candidates) == 1


def test_a_folder_that_cannot_be_read_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.png", "locked/b.png")
    scandir = os.scandir

    def locked_scandir(path: str):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked_scandir)
    listing = list_folder(tmp_path)
    (fault,) = listing.refused
    assert fault.path == tmp_path / "locked"
    assert fault.what.startswith("the folder cannot be read: Permission denied; ")


@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere", "no such folder"), ("file", "not a folder"), ("empty", "no image")],
)
def test_a_folder_without_images_is_refused(tmp_path: Path, name: str, words: str) -> None:
    touch(tmp_path, "file", "empty/readme.md")
    with pytest.raises(DataError, match=words) as caught:
        list_folder(tmp_path / name)
    assert caught.value.where == str(tmp_path / name)
    assert caught.value.hint


def test_a_note_names_a_few() -> None:
    paths = [Path(f"{n}\x1b") for n in range(7)]
    assert note("things", paths) == [
        "things (7): 0\\x1b, 1\\x1b, 2\\x1b, 3\\x1b, 4\\x1b and 2 more"
    ]
    assert note("things", []) == []

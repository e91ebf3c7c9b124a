import json
from pathlib import Path

import pytest
from PIL import Image

from eri.data import checked
from eri.data.checked import CHECKS_FILE, Checks, Finding, look
from eri.data.images import HashedFile
from eri.errors import DataError

FOUND = Finding(40, 20, 1, False, False)


def remembered(*keys: str) -> list[Finding | None]:
    with Checks() as checks:
        return [checks.find(key) for key in keys]


def test_what_is_found_is_known_to_the_next(isolated_cache: Path) -> None:
    with Checks() as checks:
        checks.add("image 00", FOUND)
        assert checks.find("image 00") == FOUND
        assert remembered("image 00") == [FOUND]  # though nobody closed the file
    assert remembered("image 00", "mask 00") == [FOUND, None]
    assert (isolated_cache / CHECKS_FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kept", [1, 20, 60, -2])
def test_a_torn_line_is_passed_over_and_ended(isolated_cache: Path, kept: int) -> None:
    with Checks() as checks:
        checks.add("image 00", FOUND)
        checks.add("image 11", FOUND)
    path = isolated_cache / CHECKS_FILE
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:kept])
    with Checks() as checks:
        assert [checks.find("image 00"), checks.find("image 11")] == [FOUND, None]
        checks.add("image 22", FOUND)
    assert remembered("image 00", "image 11", "image 22") == [FOUND, None, FOUND]


@pytest.mark.parametrize(
    "found",
    [
        [40, 20, 1, False],
        [40, 20, 1, False, False, 1],
        [40, 0, 1, False, False],
        [40, -1, 1, False, False],
        [40, "20", 1, False, False],
        [40, 20.5, 1, False, False],
        [True, 20, 1, False, False],
        [40, 20, 1, 0, False],
        {},
        None,
    ],
)
def test_what_is_no_finding_is_passed_over(isolated_cache: Path, found: object) -> None:
    note = {"of": "image 00", "found": found, "check": checked.CHECK}
    lines = [json.dumps(note).encode(), b"\xff", b"[]", b"7", b"", b"[" * 100_000]
    (isolated_cache / CHECKS_FILE).write_bytes(b"\n".join(lines))
    assert remembered("image 00") == [None]


def test_what_another_version_found_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    with Checks() as checks:
        checks.add("image 00", FOUND)
    monkeypatch.setattr(checked, "CHECK", "2 with another Pillow")
    assert remembered("image 00") == [None]


def test_one_look_at_the_same_bytes(tmp_path: Path) -> None:
    seen: list[str] = []

    def find(file: HashedFile) -> Finding:
        seen.append(file.sha256)
        return FOUND

    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 20)).save(tmp_path / name)
    with Checks() as checks:
        looks = [
            look(tmp_path / name, checks, kind, pixel_cap=800, find=find)
            for kind in ("image", "mask")
            for name in ("a.png", "b.png")
        ]
    assert len(seen) == 2  # once for each kind
    assert {one.finding for one in looks} == {FOUND}
    assert {one.sha256 for one in looks} == set(seen)


def test_a_limit_holds_for_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with Checks() as checks:
        look(tmp_path / "a.png", checks, "image", pixel_cap=800, find=lambda file: FOUND)
        with pytest.raises(DataError, match="40 x 20 are more than"):
            look(tmp_path / "a.png", checks, "image", pixel_cap=799, find=lambda file: FOUND)

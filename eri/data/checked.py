"""What decoding an image showed, kept by the hash of its bytes, so that it is decoded once.

The notes are a file of JSON lines in the cache. A line is added as soon as an image is decoded, in
one write: what a killed run knew is known to the next one. A line that was torn is passed over.
Faults are not kept: a bad file is read again each time, as another version of Pillow or a mended
disk may read it.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import PIL

from eri.data.images import HashedFile, hashed, too_large
from eri.errors import DataError
from eri.files import cache_dir, disk_errors
from eri.printable import printable

__all__ = ["CHECKS_FILE", "Checks", "Finding", "Seen", "look"]

CHECKS_FILE = "checks.jsonl"

CHECK = f"1 with Pillow {PIL.__version__}"
"""The number is raised when the same bytes come to another finding."""


class Finding(NamedTuple):
    """What the decoded pixels of a file are.

    Args:
        width: upright, in pixels.
        height: upright, in pixels.
        frames: of an animation; pages of a TIFF.
        transparent: whether any of it shows the background.
        blank: whether all of an image is transparent; whether all of a mask is black.
    """

    width: int
    height: int
    frames: int
    transparent: bool
    blank: bool


class Seen(NamedTuple):
    """The SHA-256 of a file's bytes, in hex, and what they come to."""

    sha256: str
    finding: Finding


class Checks:
    """The findings of all checks, on the disk; a context, in which they are added to.

    Threads and processes may add at the same time.

    Raises:
        DiskError: the cache folder cannot be used.
    """

    def __init__(self) -> None:
        self.path = cache_dir() / CHECKS_FILE
        self._findings: dict[str, Finding] = {}
        self._file = -1

    def __enter__(self) -> Self:
        with disk_errors(self.path):
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            with open(self._file, "rb", closefd=False) as file:
                line = b"\n"
                for line in file:
                    self._remember(line)
            if not line.endswith(b"\n"):  # torn: what is added begins on a line of its own
                os.write(self._file, b"\n")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._file)

    def find(self, key: str) -> Finding | None:
        """What was found before."""
        return self._findings.get(key)

    def add(self, key: str, finding: Finding) -> None:
        """Keeps what was found now.

        Raises:
            DiskError: it cannot be written.
        """
        line = json.dumps({"of": key, "found": finding, "check": CHECK}) + "\n"
        with disk_errors(self.path):
            os.write(self._file, line.encode())
        self._findings[key] = finding

    def _remember(self, line: bytes) -> None:
        try:
            note = json.loads(line)
            if note["check"] == CHECK:
                self._findings[note["of"]] = _finding(note["found"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return  # torn, or not ours


def look(
    path: Path,
    checks: Checks,
    kind: str,
    *,
    pixel_cap: int,
    find: Callable[[HashedFile], Finding],
) -> Seen:
    """What a file is; it is hashed, and decoded unless these bytes were before.

    Args:
        path: of the file.
        checks: what was found before, and is added to.
        kind: of what is looked for; the same bytes may be looked at as an image and as a mask.
        pixel_cap: the most pixels that it may have.
        find: decodes the file; raises as `decode` does.

    Raises:
        DataError: it cannot be opened or decoded, or is too large; names it.
    """
    with hashed(path) as file:
        key = f"{kind} {file.sha256}"
        finding = checks.find(key)
        if finding is None:
            finding = find(file)
            checks.add(key, finding)
    if finding.width * finding.height > pixel_cap:  # a source of another limit had it decoded
        what = too_large(finding.width, finding.height, pixel_cap)
        raise DataError(what, where=printable(path))
    return Seen(file.sha256, finding)


def _finding(values: list[Any]) -> Finding:
    """A finding as it was written.

    Raises:
        ValueError: it is something else.
    """
    found = Finding(*values)
    if [type(value) for value in found] != [int, int, int, bool, bool] or min(found[:3]) < 1:
        raise ValueError("not a finding")
    return found

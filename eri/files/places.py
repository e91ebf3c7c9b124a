"""Where files go: the cache, room on a disk, names that stay in their folder."""

import hashlib
import os
import re
import shutil
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from eri.errors import DiskError, ModelError
from eri.files.disk import disk_errors
from eri.printable import printable

__all__ = ["cache_dir", "contained", "require_space", "run_name"]


def cache_dir() -> Path:
    """The folder for what can be computed again: `$ERI_CACHE`, else `$XDG_CACHE_HOME/eri` or
    `~/.cache/eri`; made if needed, readable by its owner only.

    Raises:
        DiskError: it cannot be made, or belongs to somebody else.
    """
    path = _cache_path()
    with disk_errors(path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if sys.platform == "win32":
            return path
        found = path.stat()
        if found.st_uid != os.getuid():
            raise DiskError(
                "the cache folder belongs to another user",
                where=printable(path),
                hint="set ERI_CACHE to a folder of your own",
            )
        if stat.S_IMODE(found.st_mode) != 0o700:
            path.chmod(0o700)
    return path


def require_space(folder: Path, size: int) -> None:
    """Refuses to begin what the disk cannot hold.

    Args:
        folder: where the files will be; it need not exist yet.
        size: the bytes needed.

    Raises:
        DiskError: fewer bytes are free.
    """
    whole = folder.absolute()
    existing = next(path for path in (whole, *whole.parents) if path.exists())
    with disk_errors(folder):
        free = shutil.disk_usage(existing).free
    if free < size:
        raise DiskError(
            f"{size / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free",
            where=printable(folder),
            hint="free some space or choose another folder",
        )


def contained(root: Path, name: str, *, links_into: Sequence[Path] = ()) -> Path:
    """The path `name` below `root`, for names that come out of a file; `links_into` names other
    folders that a link, not the name itself, may lead into.

    Raises:
        ModelError: the name is absolute or leads out of `root`, also through a link.
    """
    try:
        below = Path(os.path.normpath(root / name)).is_relative_to(os.path.normpath(root))
        homes = (root, *links_into) if below else (root,)
        real = Path(os.path.realpath(root / name))
        inside = any(real.is_relative_to(os.path.realpath(home)) for home in homes)
    except ValueError:  # a NUL or a lone surrogate: no file has such a name
        inside = False
    if not inside:
        what = f"the name '{printable(name)}' leads out of its folder"
        raise ModelError(what, where=printable(root))
    return root / name


def run_name(text: str) -> str:
    """A name made from `text` that every file system takes: `[A-Za-z0-9._-]`, at most 107 bytes.

    Texts that differ in other letters have names that differ, too.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:100].strip("-.")
    if not text.isascii():
        own = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:6]
        return f"{name or 'run'}-{own}"
    reserved = re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name)
    return f"run-{name}" if reserved else name or "run"


def _cache_path() -> Path:
    chosen = os.environ.get("ERI_CACHE")
    if chosen:
        return Path(chosen).absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):  # the XDG specification says to ignore a relative one
        return Path(shared) / "eri"
    try:
        return Path.home() / ".cache" / "eri"
    except RuntimeError as error:
        raise DiskError("you have no home folder for the cache", hint="set ERI_CACHE") from error

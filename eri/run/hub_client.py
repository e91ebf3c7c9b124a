"""The Hugging Face Hub through huggingface_hub, with every way to fail in our words.

What a server says, and what the errors of other libraries say, is never shown: an address may be
signed, and a header holds the token.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from eri import __version__
from eri.errors import ConfigError, DiskError, ModelError
from eri.files import DISK_PROBLEMS, disk_errors
from eri.printable import printable

__all__ = ["COMMIT", "HubId", "Remote", "Unreachable", "cache_dir", "look_up", "quiet", "storage"]

COMMIT = re.compile(r"[0-9a-f]{40}")
ENDPOINT = "https://huggingface.co"
TIMEOUT = 30  # seconds without an answer to the first question
BUSY = (408, 429)  # answers that, like 500 and above, may be other ones in a while
LOG_IN = "run `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class HubId:
    """A repository of the Hub, `owner/name`, and a branch, tag or commit of it."""

    repo: str
    revision: str = "main"

    @property
    def name(self) -> str:
        """What people call the model: the repository without its owner."""
        return self.repo.partition("/")[2]

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}"


class Unreachable(Exception):  # noqa: N818 - not the end: the cache may hold a copy
    """The Hub cannot be reached: why, in our words, and one thing to do."""

    def __init__(self, why: str, *, hint: str = "check the network and try again") -> None:
        super().__init__(why)
        self.hint = hint


@dataclass(frozen=True)
class Remote:
    """One commit of a repository: its files with their sizes in bytes, and where they go."""

    hub_id: HubId
    commit: str
    sizes: dict[str, int | None]
    cache: Path
    endpoint: str

    @property
    def snapshot(self) -> Path:
        """The folder of this commit in the cache."""
        return storage(self.hub_id, self.cache) / "snapshots" / self.commit

    def has(self, name: str) -> bool:
        """Whether a file is in the cache, with the size that it has on the Hub."""
        path = self.snapshot / name
        with disk_errors(path):
            return path.is_file() and self.sizes[name] in {None, path.stat().st_size}

    def get(self, name: str) -> None:
        """Download a file unless it is there; a copy of another size is fetched anew.

        Raises:
            Unreachable, ModelError, DiskError: it is not there, whole, afterwards.
        """
        from huggingface_hub import hf_hub_download

        for force in (False, True):
            if self.has(name):
                return
            with _translated(self.hub_id, self.cache, self.endpoint):
                hf_hub_download(
                    self.hub_id.repo,
                    name,
                    revision=self.commit,
                    cache_dir=self.cache,
                    endpoint=self.endpoint,
                    force_download=force,
                    library_name="eri",
                    library_version=__version__,
                )
        if not self.has(name):
            raise ModelError(
                f"{printable(name)} does not arrive with its {self.sizes[name]} bytes",
                where=self.hub_id,
                hint="try again later",
            )


def look_up(hub_id: HubId, cache: Path) -> Remote:
    """The commit that a revision is, and its files; one request.

    Raises:
        Unreachable: there is no network, or HF_HUB_OFFLINE forbids it.
        ModelError: there is no such repository or revision, or it may not be read.
        ConfigError: HF_ENDPOINT or the token cannot be used.
    """
    from huggingface_hub import HfApi

    if any(_is_true(os.environ.get(name)) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")):
        raise _offline()
    endpoint = _endpoint()
    _check_token()
    api = HfApi(endpoint=endpoint, library_name="eri", library_version=__version__)
    with _translated(hub_id, cache, endpoint):
        try:
            found = api.model_info(
                hub_id.repo, revision=hub_id.revision, files_metadata=True, timeout=TIMEOUT
            )
            sizes = {file.rfilename: file.size for file in found.siblings or ()}
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError("not an answer of a Hub") from error
        pinned = hub_id.revision if COMMIT.fullmatch(hub_id.revision) else found.sha
        if not COMMIT.fullmatch(str(found.sha)) or found.sha != pinned:
            raise ValueError("not a commit, or another one")
    files = {name: size for name, size in sizes.items() if isinstance(name, str)}
    return Remote(hub_id, str(found.sha), files, cache, endpoint)


def cache_dir() -> Path:
    """Where huggingface_hub keeps downloads, by its own rules, as the environment is now."""
    home = os.environ.get("HF_HOME")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    folder = os.path.expandvars(given or os.path.join(home, "hub"))
    return Path(os.path.expanduser(folder)).absolute()


def storage(hub_id: HubId, cache: Path) -> Path:
    """The folder of a repository in a cache of huggingface_hub: blobs, refs, snapshots."""
    return cache / f"models--{hub_id.repo.replace('/', '--')}"


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps huggingface_hub from telemetry, and from log lines, which name signed addresses."""
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _endpoint() -> str:
    endpoint = (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
    try:
        parts = urlsplit(endpoint)
        usable = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:  # no address at all, or a port that is no number
        usable = False
    if not usable or printable(endpoint) != endpoint:
        raise ConfigError(
            "this is not the address of a Hub",
            where="HF_ENDPOINT",
            hint=f"unset it, or write it like {ENDPOINT}",
        )
    return endpoint


def _check_token() -> None:
    """Refuses a token that no header can carry, before a library shows it in an error."""
    from huggingface_hub.utils import build_hf_headers

    sent = build_hf_headers().get("authorization", "")
    if not (sent.isascii() and sent.isprintable()):
        raise ConfigError(
            "the token for the Hub has characters that no token has",
            where="HF_TOKEN",
            hint="log in again: `hf auth login`",
        )


@contextmanager
def _translated(hub_id: HubId, cache: Path, endpoint: str) -> Iterator[None]:
    """Turns every error of huggingface_hub inside into Unreachable or one of ours."""
    from huggingface_hub.errors import HTTPError  # the root of its HTTP library's errors

    try:
        yield
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        cause = _cause(error)
        host = printable(str(urlsplit(endpoint).hostname))
        ours = _as_answer(cause, hub_id, host) or _as_disk_error(cause, cache)
        raise (ours or _as_unreachable(cause, hub_id, host)) from error


def _cause(error: BaseException) -> BaseException:
    """What huggingface_hub wraps when it finds no copy in the cache either."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wraps = (LocalEntryNotFoundError, ValueError)
    while isinstance(error, wraps) and not isinstance(error, HfHubHTTPError) and error.__cause__:
        error = error.__cause__
    return error


def _as_answer(error: BaseException, hub_id: HubId, host: str) -> Exception | None:
    """The Hub answered, and the answer is no."""
    from huggingface_hub import errors

    if not isinstance(error, errors.HfHubHTTPError):
        return None
    status = error.response.status_code
    if status >= 500 or status in BUSY:
        return Unreachable(f"{host} answers with error {status}", hint="try again later")
    if isinstance(error, errors.GatedRepoError):
        what = "this repository is gated: its owner decides who may download it"
        hint = f"ask for access on https://{host}/{hub_id.repo}, then {LOG_IN}"
    elif isinstance(error, errors.RevisionNotFoundError):
        what = f"the repository has no revision '{printable(hub_id.revision)}'"
        hint = "choose a branch, tag or commit that its page lists"
    elif isinstance(error, errors.RepositoryNotFoundError):
        what = f"there is no such path, and {host} has no such repository, or a private one"
        hint = f"check the name; for a private one {LOG_IN}"
    elif isinstance(error, errors.DisabledRepoError):
        what, hint = "this repository is disabled", "choose another one"
    elif status in {401, 403}:
        what, hint = f"{host} refuses the token, or wants one: error {status}", LOG_IN
    else:
        what, hint = f"{host} refuses: error {status}", "try again later"
    return ModelError(what, where=hub_id, hint=hint)


def _as_disk_error(error: BaseException, cache: Path) -> DiskError | None:
    """The disk is at fault; hf_xet says so in its text only."""
    number = getattr(error, "errno", None)
    if number is None and (told := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(told[1])
    if number not in DISK_PROBLEMS:
        return None
    what, hint = DISK_PROBLEMS[number]
    where = printable(getattr(error, "filename", None) or cache)
    return DiskError(what, where=where, hint=f"{hint}; HF_HUB_CACHE names the folder of downloads")


def _as_unreachable(error: BaseException, hub_id: HubId, host: str) -> Exception:
    """The network is at fault, or what answers is not a Hub."""
    from huggingface_hub.errors import FileMetadataError, HTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return _offline()
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
        late = "Timeout" in type(error).__name__  # of several libraries
        return Unreachable(f"{host} {'does not answer' if late else 'cannot be reached'}")
    if isinstance(error, (OSError, RuntimeError)) and not isinstance(error, FileMetadataError):
        return Unreachable(f"the download from {host} broke off")
    return ModelError(
        f"what answers as {host} is not a Hub",
        where=hub_id,
        hint="log in to the network if it wants that, and check HF_ENDPOINT",
    )


def _offline() -> Unreachable:
    return Unreachable("HF_HUB_OFFLINE is set", hint="unset it where there is a network")


def _is_true(value: Any) -> bool:
    return str(value).upper() in {"1", "ON", "YES", "TRUE"}

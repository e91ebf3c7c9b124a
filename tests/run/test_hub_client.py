"""The Hub's ways to say no, and the network's: one clear line each, with the right exit code."""

import errno
import json
import logging
import os
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from eri.errors import ConfigError, DiskError, EriError, ModelError
from eri.run import hub_client
from eri.run.hub_client import HubId, Remote, Unreachable, cache_dir, look_up, quiet, storage
from tests.stub_hub import COMMIT, TOKEN, StubHub, stub_hub

ID = HubId("owner/name", "v1.0")
FILE = "unet/config.json"


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    with stub_hub({FILE: b"{}", "README.md": b"read me"}, tmp_path, monkeypatch) as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        with quiet():
            yield server


def whole_text(error: BaseException) -> str:
    """All that anybody could print of an error, the traceback of --debug included."""
    ours = [str(error), *(str(getattr(error, name, "")) for name in ("where", "hint", "problems"))]
    return "\n".join([*ours, *traceback.format_exception(error)])


def test_a_commit_and_its_files(stub: StubHub, tmp_path: Path) -> None:
    remote = look_up(ID, tmp_path)
    assert remote.commit == COMMIT
    assert remote.sizes == {FILE: 2, "README.md": 7}
    assert stub.asked == ["GET /api/models/owner/name/revision/v1.0"]
    assert not remote.has(FILE)
    remote.get(FILE)
    assert remote.has(FILE)
    assert (storage(ID, tmp_path) / "snapshots" / COMMIT / FILE).read_bytes() == b"{}"


GATED = {"X-Error-Code": "GatedRepo"}
REFUSALS = [
    (401, GATED, "this repository is gated", "ask for access on https://127.0.0.1/owner/name"),
    (403, GATED, "this repository is gated", "hf auth login"),
    (404, {"X-Error-Code": "RepoNotFound"}, "no such path, and 127.0.0.1 has no", "check the name"),
    (404, {"X-Error-Code": "RevisionNotFound"}, "no revision 'v1.0'", "branch, tag or commit"),
    (403, {"X-Error-Message": "Access to this resource is disabled."}, "disabled", "another"),
    (401, {}, "refuses the token, or wants one: error 401", "hf auth login"),
    (403, {}, "refuses the token, or wants one: error 403", "hf auth login"),
    (400, {}, "refuses: error 400", "later"),
    (418, {}, "refuses: error 418", "later"),
]


@pytest.mark.parametrize(("status", "headers", "what", "hint"), REFUSALS)
def test_refusals(
    stub: StubHub, tmp_path: Path, status: int, headers: dict[str, str], what: str, hint: str
) -> None:
    stub.refuse = (status, headers | {"X-Echo": TOKEN})
    with pytest.raises(ModelError, match=re.escape(what)) as caught:
        look_up(ID, tmp_path)
    assert caught.value.exit_code == 4
    assert caught.value.where == "owner/name@v1.0"
    assert hint in str(caught.value.hint)
    assert "\n" not in str(caught.value)
    assert TOKEN not in whole_text(caught.value)


@pytest.mark.parametrize(("status", "headers", "what", "hint"), REFUSALS[:4])
def test_refusals_of_a_file(
    stub: StubHub, tmp_path: Path, status: int, headers: dict[str, str], what: str, hint: str
) -> None:
    remote = look_up(ID, tmp_path)
    stub.refuse_files = (status, headers)
    with pytest.raises(ModelError, match=re.escape(what)) as caught:
        remote.get(FILE)
    assert hint in str(caught.value.hint)


def test_a_repository_or_revision_that_is_not_there(stub: StubHub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such repository"):
        look_up(HubId("owner/other"), tmp_path)
    with pytest.raises(ModelError, match=r"no revision 'v2\.0'"):
        look_up(HubId("owner/name", "v2.0"), tmp_path)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_hub_is_unreachable(stub: StubHub, tmp_path: Path, status: int) -> None:
    remote = look_up(ID, tmp_path)
    stub.refuse_files = (status, {})
    with pytest.raises(Unreachable, match=f"answers with error {status}"):
        remote.get(FILE)
    stub.refuse = (status, {})
    with pytest.raises(Unreachable, match=f"answers with error {status}"):
        look_up(ID, tmp_path)


def test_no_answer(stub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "TIMEOUT", 0.1)
    stub.stall = True
    with pytest.raises(Unreachable, match=r"^127\.0\.0\.1 does not answer$"):
        look_up(ID, tmp_path)


def test_no_connection(stub: StubHub, tmp_path: Path) -> None:
    remote = look_up(ID, tmp_path)
    stub.stop()
    for ask in (lambda: look_up(ID, tmp_path), lambda: remote.get(FILE)):
        with pytest.raises(Unreachable, match=r"^127\.0\.0\.1 cannot be reached$") as caught:
            ask()
        assert TOKEN not in whole_text(caught.value)


def test_a_damaged_file_and_no_connection(stub: StubHub, tmp_path: Path) -> None:
    remote = look_up(ID, tmp_path)
    remote.get(FILE)
    (remote.snapshot / FILE).write_bytes(b"too long")
    stub.stop()
    with pytest.raises(Unreachable, match="cannot be reached"):
        remote.get(FILE)


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline(stub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "yes")
    with pytest.raises(Unreachable, match="HF_HUB_OFFLINE is set"):
        look_up(ID, tmp_path)
    assert stub.asked == []
    monkeypatch.setenv(name, "0")
    look_up(ID, tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Unreachable, match="HF_HUB_OFFLINE is set"):
        look_up(ID, tmp_path)


OTHER = "f" * 40
LISTING = {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": FILE}]}


@pytest.mark.parametrize(
    "page",
    [
        "<html>Log in to the network of this hotel</html>",
        "[]",
        "{}",
        '"text"',
        json.dumps(LISTING | {"sha": None}),
        json.dumps(LISTING | {"sha": "../../../evil"}),
        json.dumps(LISTING | {"sha": OTHER + "\n"}),
        json.dumps(LISTING | {"sha": OTHER}),  # not the commit that was asked for
        json.dumps(LISTING | {"siblings": [{}]}),
        json.dumps(LISTING | {"siblings": [7]}),
        json.dumps(LISTING | {"siblings": [{"rfilename": ["a"]}]}),
    ],
    ids=range(11),
)
def test_an_answer_that_is_not_one_of_a_hub(stub: StubHub, tmp_path: Path, page: str) -> None:
    stub.page = page.encode()
    with pytest.raises(ModelError, match=r"what answers as 127\.0\.0\.1 is not a Hub") as caught:
        look_up(HubId("owner/name", COMMIT), tmp_path)
    assert "HF_ENDPOINT" in str(caught.value.hint)


def test_a_file_without_a_commit(stub: StubHub, tmp_path: Path) -> None:
    remote = look_up(ID, tmp_path)
    stub.refuse_files = (200, {"ETag": '"x"'})
    with pytest.raises(ModelError, match="is not a Hub"):
        remote.get(FILE)


def test_sizes_that_are_not_told(stub: StubHub, tmp_path: Path) -> None:
    stub.page = json.dumps(LISTING).encode()
    remote = look_up(ID, tmp_path)
    assert remote.sizes == {FILE: None}
    remote.get(FILE)
    assert remote.has(FILE)


# errors that no stub can bring about


@pytest.mark.parametrize(
    ("raised", "kind", "what"),
    [
        (OSError(errno.ENOSPC, "full"), DiskError, "the disk is full"),
        (PermissionError(errno.EACCES, "no", "/x/y"), DiskError, "permission denied"),
        (RuntimeError("I/O: No space left on device (os error 28)"), DiskError, "disk is full"),
        (OSError("Consistency check failed"), Unreachable, "broke off"),
        (RuntimeError("CAS client"), Unreachable, "broke off"),
        (PermissionError("Xet authentication"), Unreachable, "broke off"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), Unreachable, "cannot be reached"),
        (TimeoutError("late"), Unreachable, "does not answer"),
        (ValueError("Xet headers"), ModelError, "is not a Hub"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_errors_of_the_libraries(
    stub: StubHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    kind: type[Exception],
    what: str,
) -> None:
    def fail(*given: object, **named: object) -> None:
        raise raised

    remote = look_up(ID, tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(kind, match=what) as caught:
        remote.get(FILE)
    if isinstance(caught.value, EriError):
        assert caught.value.exit_code == (5 if kind is DiskError else 4)
    if kind is DiskError:
        assert caught.value.where in {"/x/y", str(tmp_path)}
        assert "HF_HUB_CACHE" in str(caught.value.hint)


def test_a_bug_is_not_dressed_up(
    stub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = look_up(ID, tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo: None)
    with pytest.raises(TypeError, match="unexpected keyword"):
        remote.get(FILE)


# the environment


@pytest.mark.parametrize(
    "endpoint",
    ["huggingface.co", "ftp://x", "https://", "http://x:port", "http://x\x1b", "http://["],
)
def test_a_bad_endpoint(
    stub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(ConfigError, match="not the address of a Hub"):
        look_up(ID, tmp_path)
    assert stub.asked == []


def test_a_slash_after_the_endpoint(
    stub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", stub.endpoint + "/")
    assert look_up(ID, tmp_path).endpoint == stub.endpoint


def test_a_password_in_the_endpoint_is_not_shown(
    stub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.stop()
    monkeypatch.setenv("HF_ENDPOINT", stub.endpoint.replace("//", "//me:secret@"))
    with pytest.raises(Unreachable) as caught:
        look_up(ID, tmp_path)
    assert "secret" not in whole_text(caught.value)


@pytest.mark.parametrize("bad", ["\x07", "é", "\u202e"])
def test_a_token_that_no_header_can_carry(
    stub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}{bad}x")
    with pytest.raises(ConfigError, match="characters that no token has") as caught:
        look_up(ID, tmp_path)
    assert TOKEN not in whole_text(caught.value)
    assert stub.asked == []


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({}, "~/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x", "HF_HOME": "/h"}, "/h/hub"),
        ({"HF_HOME": "~/h"}, "~/h/hub"),
        ({"HF_HOME": "/h", "HUGGINGFACE_HUB_CACHE": "/old"}, "/old"),
        ({"HF_HUB_CACHE": "/new", "HUGGINGFACE_HUB_CACHE": "/old"}, "/new"),
        ({"HF_HUB_CACHE": "$HF_X/c", "HF_X": "/v"}, "/v/c"),
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(
    stub: StubHub, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], folder: str
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(os.path.expanduser(folder))


def test_quiet_lasts_as_long_as_its_block() -> None:
    log = logging.getLogger("huggingface_hub")
    before = log.level
    with pytest.raises(KeyError), quiet():
        assert not log.isEnabledFor(logging.ERROR)
        raise KeyError
    assert log.level == before


def test_names_and_folders() -> None:
    assert str(ID) == "owner/name@v1.0"
    assert ID.name == "name"
    remote = Remote(ID, COMMIT, {}, Path("/c"), "https://x")
    assert remote.snapshot == Path(f"/c/models--owner--name/snapshots/{COMMIT}")

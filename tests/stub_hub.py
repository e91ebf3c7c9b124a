"""A Hub on this machine: the answers of huggingface.co that huggingface_hub asks a model for."""

import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_thisTokenIsNobodysBusiness"


class StubHub:
    """One repository, `owner/name`, and a list of all that was asked.

    `refuse` answers every question with a status and headers; `cut` counts how often a file is
    broken off in the middle; `page` stands in for every answer of the API; `stall` lets every
    question wait until the end.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.commit = COMMIT
        self.revisions = {"main", "v1.0", "refs/pr/1"}
        self.files = files
        self.names: list[Any] = []  # further names in the listing, without files
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.agents: set[str | None] = set()
        self.refuse: tuple[int, dict[str, str]] | None = None
        self.refuse_files: tuple[int, dict[str, str]] | None = None
        self.cut: Counter[str] = Counter()
        self.page: bytes | None = None
        self.stall = False
        self.over = threading.Event()
        handler = type("Bound", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self) -> None:
        if not self.over.is_set():
            self.over.set()
            huggingface_hub.close_session()
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()

    def fetched(self) -> list[str]:
        """The files that were sent, wholly or in part, each once."""
        sent = {line.split("/resolve/")[1] for line in self.asked if line.startswith("GET /owner")}
        return sorted(name.partition("/")[2] for name in sent)

    def listing(self) -> dict[str, Any]:
        files: list[dict[str, Any]] = [
            {"rfilename": name, "size": len(content)} for name, content in self.files.items()
        ]
        files += [{"rfilename": name, "size": 7} for name in self.names]
        return {"id": "owner/name", "sha": self.commit, "siblings": files}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a header and a body in two packets, without a wait
    hub: StubHub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.reply(body=False)

    def do_GET(self) -> None:
        self.reply(body=True)

    def reply(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        self.hub.tokens.add(self.headers.get("authorization"))
        self.hub.agents.add(self.headers.get("user-agent"))
        if self.hub.stall:
            self.hub.over.wait(30)
            self.close_connection = True
        elif self.hub.refuse is not None:
            self.send(*self.hub.refuse)
        elif asked := re.fullmatch(r"/api/models/owner/name/revision/(.+)", path):
            self.api(asked[1])
        elif asked := re.fullmatch(r"/owner/name/resolve/([0-9a-f]{40})/(.+)", path):
            self.file(asked[1], asked[2], body=body)
        else:
            self.send(404, {"X-Error-Code": "RepoNotFound"})

    def api(self, revision: str) -> None:
        if revision not in self.hub.revisions | {self.hub.commit}:
            self.send(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            self.send(200, {}, self.hub.page or json.dumps(self.hub.listing()).encode())

    def file(self, commit: str, name: str, *, body: bool) -> None:
        if self.hub.refuse_files is not None:
            return self.send(*self.hub.refuse_files)
        if commit != self.hub.commit or name not in self.hub.files:
            return self.send(404, {"X-Error-Code": "EntryNotFound"})
        content = self.hub.files[name]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
        start, status = 0, 200
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", "")):
            start, status = int(asked[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if not body or not self.hub.cut[name]:
            return self.send(status, headers, content[start:], body=body)
        self.hub.cut[name] -= 1
        half = start + (len(content) - start) // 2
        self.send(status, headers, content[start:half], length=len(content) - start)
        self.close_connection = True

    def send(
        self,
        status: int,
        headers: dict[str, str],
        content: bytes = b"",
        *,
        body: bool = True,
        length: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if body:
            self.wfile.write(content)


@contextmanager
def stub_hub(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[StubHub]:
    """A running Hub, and an environment in which nothing of this machine's own is left."""
    for name in list(os.environ):
        if re.match(r"(?i)HF_|HUGGING|TRANSFORMERS_|DISABLE_TEL|.*_PROXY$|XDG_CACHE_HOME", name):
            monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # read when it was imported
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no-tokens"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the tries of huggingface_hub
    huggingface_hub.close_session()
    hub = StubHub(files)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    try:
        yield hub
    finally:
        hub.stop()

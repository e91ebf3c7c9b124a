"""Runs of the command line in processes of their own, to be watched, killed and looked at.

`start` begins the real thing: a fresh Python. A `ForkServer` imports everything once and forks a
process for each session, which runs the same `eri.cli.main` with its own arguments, environment
and process group, but needs no seconds to import.
"""

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Ended", "ForkServer", "Session", "start"]

ROOT = Path(__file__).parents[2]
POLL = 0.005  # seconds between two looks at a session
PATIENCE = 120.0  # seconds until a session that does not end is a failure


@dataclass(frozen=True)
class Ended:
    """What a session left: its exit code (minus the signal that killed it) and what it said."""

    code: int
    out: str
    err: str
    seconds: float


class Session:
    """A process that runs the command line.

    Args:
        pid: of it, and of its process group.
        folder: where its stdout and stderr are.
        poll: its exit code, or None while it runs.
    """

    def __init__(self, pid: int, folder: Path, poll: Callable[[], int | None]) -> None:
        self.pid = pid
        self.folder = folder
        self._poll = poll
        self._began = time.monotonic()

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return (self.folder / "stdout").read_text(errors="surrogateescape")

    @property
    def err(self) -> str:
        """What it has printed on stderr so far."""
        return (self.folder / "stderr").read_text(errors="surrogateescape")

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        return self._poll()

    def kill(self, number: int = signal.SIGKILL, *, group: bool = False) -> None:
        """Send a signal, to its workers too with `group`; nothing happens once it has ended."""
        try:
            (os.killpg if group else os.kill)(self.pid, number)
        except ProcessLookupError:
            pass

    def wait_for(self, condition: Callable[[], bool], *, patience: float = PATIENCE) -> bool:
        """Wait until something is so; False when the session ended before it was."""
        until = time.monotonic() + patience
        while not condition():
            if self.poll() is not None:
                return condition()
            if time.monotonic() > until:
                self.kill(group=True)
                raise AssertionError(f"waited {patience} s in vain; it said:\n{self.out}{self.err}")
            time.sleep(POLL)
        return True

    def wait(self, *, patience: float = PATIENCE) -> Ended:
        """Wait until it has ended."""
        self.wait_for(lambda: self.poll() is not None, patience=patience)
        code = self.poll()
        assert code is not None
        return Ended(code, self.out, self.err, time.monotonic() - self._began)


def start(
    *arguments: object,
    folder: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    **popen: Any,
) -> Session:
    """Begin `python -m eri` with these arguments.

    Args:
        arguments: of the command line.
        folder: new, or of the session before; gets its stdout and stderr.
        env: joins this process's environment.
        cwd: where it runs.
        popen: passed on to `subprocess.Popen`, such as a `stdout` of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "eri", *map(str, arguments)],
            **({"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err} | popen),
            env=os.environ | {"PYTHONPATH": str(ROOT)} | (env or {}),
            cwd=cwd,
            start_new_session=True,
        )
    return Session(process.pid, folder, process.poll)


class ForkServer:
    """A process that has imported all that training needs, and forks sessions; a context manager.

    Use one for many tests. A session may first call a function of a test module, which can patch
    what is to fail in it: `server.start("train", config, folder=…, hook="tests.x:f", given=[…])`.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tests.torture.sessions import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        self._codes: dict[int, int] = {}
        self._waiting = b""

    def __enter__(self) -> "ForkServer":
        self._answer("ready", patience=PATIENCE)
        return self

    def __exit__(self, *ignored: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def start(
        self,
        *arguments: object,
        folder: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        hook: str | None = None,
        given: Sequence[object] = (),
    ) -> Session:
        """Begin a session in a fork.

        Args:
            arguments: of the command line.
            folder: new, or of the session before; gets its stdout and stderr.
            env: joins this process's environment as it is now.
            cwd: where it runs.
            hook: `module:function`, called in the session before the command line is.
            given: JSON values for the hook.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("stdout", "stderr"):
            (folder / name).write_bytes(b"")
        job = {
            "arguments": [str(argument) for argument in arguments],
            "folder": str(folder.absolute()),
            "env": dict(os.environ) | dict(env or {}),
            "cwd": str((cwd or Path.cwd()).absolute()),
            "hook": hook,
            "given": list(given),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        pid = self._answer("pid", patience=30)
        return Session(pid, folder, lambda: self._code(pid))

    def _code(self, pid: int) -> int | None:
        if pid not in self._codes:
            self._read(0)
        return self._codes.get(pid)

    def _answer(self, key: str, *, patience: float) -> int:
        until = time.monotonic() + patience
        while time.monotonic() < until:
            found = self._read(0.05)
            if key in found:
                return found[key]
            if self._process.poll() is not None:
                break
        raise AssertionError("the server that forks sessions does not answer")

    def _read(self, seconds: float) -> dict[str, int]:
        """What the server said; the codes of sessions that ended are kept."""
        assert self._process.stdout is not None
        answer: dict[str, int] = {}
        if select.select([self._process.stdout], [], [], seconds)[0]:
            self._waiting += os.read(self._process.stdout.fileno(), 1 << 16)
        *lines, self._waiting = self._waiting.split(b"\n")
        for line in lines:
            said = json.loads(line)
            if "ended" in said:
                self._codes[said["ended"]] = said["code"]
            else:
                answer |= said
        return answer


def serve() -> None:
    """Fork a session for each line of stdin until it is closed; tell of each that ends."""
    import torch
    from diffusers import AutoencoderKL  # noqa: F401 - loaded here so that no fork has to
    from PIL import Image
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    import eri.cli  # noqa: F401
    import eri.run.inspect  # noqa: F401
    import eri.run.train  # noqa: F401
    from tests.torture import victims

    Image.init()
    victims.layers()
    torch.set_num_threads(1)
    os.set_inheritable(1, False)
    _tell(ready=1)
    waiting = b""
    while True:
        if select.select([0], [], [], 0.01)[0]:
            read = os.read(0, 1 << 20)
            if not read:
                break
            *lines, waiting = (waiting + read).split(b"\n")
            for line in lines:
                _tell(pid=_fork(json.loads(line)))
        _reap()


def _tell(**said: int) -> None:
    os.write(1, json.dumps(said).encode() + b"\n")


def _reap() -> None:
    try:
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            _tell(ended=ended[0], code=os.waitstatus_to_exitcode(ended[1]))
    except ChildProcessError:
        pass


def _fork(job: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70  # of a session that did not even begin
    try:
        code = _run(job)
    except BaseException:  # noqa: BLE001 - a bug, as a Python of its own would tell of it
        traceback.print_exc()
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                pass
        os._exit(code)


def _run(job: dict[str, Any]) -> int:
    """The session itself, in its fork."""
    os.setsid()
    folder = Path(job["folder"])
    for number, path, mode in (
        (0, Path(os.devnull), os.O_RDONLY),
        (1, folder / "stdout", os.O_WRONLY | os.O_APPEND),
        (2, folder / "stderr", os.O_WRONLY | os.O_APPEND),
    ):
        descriptor = os.open(path, mode)
        os.dup2(descriptor, number)
        if descriptor > 2:
            os.close(descriptor)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    if job["hook"]:
        module, _, function = job["hook"].partition(":")
        getattr(importlib.import_module(module), function)(*job["given"])
    sys.argv = ["eri", *job["arguments"]]
    from eri.cli import main

    try:
        main()
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            return 1
        return error.code or 0

"""What every test stands on: one thread, no network, a cache of its own, a GPU where marked."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

# Before anything imports torch, diffusers or transformers; child processes inherit them.
os.environ |= {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # as `eri` sets it
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_OFFLINE": "1",
}

import torch

from eri.layers.backend import no_kernels
from tests.families import save_sd15_real, save_sd21, save_sdxl
from tests.tiny import save_sd15
from tests.torture.sessions import ForkServer

torch.set_num_threads(1)

# PyTorch says once a process that the thread of its first backward pass had no CUDA context yet.
first_context = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")


@pytest.fixture(autouse=True)
def isolated_cache(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """An empty ERI_CACHE for each test, outside the test's own tmp_path.

    The kernels are those of this machine's cache: tests of a GPU do not build them for each worker.
    """
    if request.node.get_closest_marker("gpu"):
        no_kernels(torch.device("cuda"))
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ERI_CACHE", str(cache))
    return cache


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections leave this process only to the machine itself."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in {"127.0.0.1", "::1", "localhost"}:
            raise AssertionError(f"a test wanted to connect to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes never become a test's name: they may hold a time, and workers must agree on names."""
    return argname if isinstance(val, bytes) else None


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none; what a file sets up stands once.

    The tests of a file run in one worker, but those of a GPU, as do all of those that the server of
    forked sessions serves, which begin first. With many workers there are a few servers.
    """
    servers = max(1, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) // 4)
    skipped = not torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("gpu"):
            if not skipped:
                continue
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))
        place = item.nodeid.partition(".py::")[0].removeprefix("tests/")
        served = "server" in getattr(item, "fixturenames", ())
        group = f"served {crc32(place.encode()) % servers}" if served else place
        item.add_marker(pytest.mark.xdist_group(group))
        if getattr(item.config.option, "loadgroup", False):  # in a worker of scripts/test
            _name_group(item, group)
    items.sort(key=lambda item: "server" not in getattr(item, "fixturenames", ()))


def _name_group(item: pytest.Item, group: str) -> None:
    """Tell the scheduler of pytest-xdist the group, which it reads behind the name.

    pytest-xdist 3.8 writes it where pytest 9.2 does not look any more: the tests of a file would
    run in all workers, and each of these would make what the file sets up.
    """
    if (found := getattr(item, "_id", None)) is not None:  # older ones look where it is written
        item._id = type(found).parse(f"{item.nodeid}@{group}")  # type: ignore[attr-defined]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, first_context])])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Each device in turn; TensorFloat-32 would hide errors behind its 10-bit mantissa."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device(request.param)


@pytest.fixture(scope="session")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small random base model; read only."""
    return save_sd15(tmp_path_factory.mktemp("models") / "sd15")


@pytest.fixture(scope="session")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of half as many layers, as distilled models have: for whole runs; read only."""
    return save_sd15(tmp_path_factory.mktemp("models") / "shallow", depth=1)


@pytest.fixture(scope="session")
def sd15_real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SD1.5 that has CLIP's vocabulary and can be written as one file; read only."""
    return save_sd15_real(tmp_path_factory.mktemp("models") / "sd15_real")


@pytest.fixture(scope="session")
def sd21(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small random SD2.1; read only."""
    return save_sd21(tmp_path_factory.mktemp("models") / "sd21")


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small random SDXL; read only."""
    return save_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    """Forks sessions of the command line; see `ForkServer.start`."""
    with ForkServer() as server:
        yield server
